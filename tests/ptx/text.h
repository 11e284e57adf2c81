// Words of PTX: what every reader of its text needs.
#pragma once
#include <cstdint>
#include <string>
#include <vector>

namespace ptx {

std::string without_comments(std::string text);                          // spaces for them; line breaks stay
std::string trimmed(const std::string& text);                            // one space between words, none around
std::vector<std::string> split(const std::string& text, char at = ',');  // outside brackets; trimmed
bool starts_with(const std::string& text, const char* start);
int bits_of(const std::string& type);       // "u32", "pred"
uint64_t literal(const std::string& text);  // the bits of a number; an Error for anything else

}  // namespace ptx
