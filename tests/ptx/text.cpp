#include "text.h"

#include <algorithm>
#include <cctype>
#include <cstring>

#include "program.h"

namespace ptx {

std::string without_comments(std::string text) {
  for (size_t i = 0; i + 1 < text.size(); ++i) {
    if (text[i] != '/') continue;
    if (text[i + 1] == '/') {
      for (; i < text.size() && text[i] != '\n'; ++i) text[i] = ' ';
    } else if (text[i + 1] == '*') {
      const size_t end = std::min(text.find("*/", i + 2), text.size() - 2) + 2;
      for (; i < end; ++i)
        if (text[i] != '\n') text[i] = ' ';
    }
  }
  return text;
}

std::string trimmed(const std::string& text) {
  std::string out;
  for (char c : text) {
    if (!std::isspace(static_cast<unsigned char>(c))) {
      out += c;
    } else if (!out.empty() && out.back() != ' ') {
      out += ' ';
    }
  }
  while (!out.empty() && out.back() == ' ') out.pop_back();
  return out;
}

std::vector<std::string> split(const std::string& text, char at) {
  std::vector<std::string> parts;
  std::string part;
  int depth = 0;
  for (char c : text) {
    depth += (c == '{' || c == '[' || c == '(') - (c == '}' || c == ']' || c == ')');
    if (c == at && depth == 0) {
      parts.push_back(trimmed(part));
      part.clear();
    } else {
      part += c;
    }
  }
  if (!trimmed(part).empty()) parts.push_back(trimmed(part));
  return parts;
}

bool starts_with(const std::string& text, const char* start) { return text.compare(0, std::strlen(start), start) == 0; }

int bits_of(const std::string& type) {
  if (type == "pred") return 1;
  const size_t digit = type.find_first_of("0123456789");
  if (digit == std::string::npos) throw Error("no type: ." + type);
  return std::stoi(type.substr(digit));
}

uint64_t literal(const std::string& text) {
  if (starts_with(text, "0f") || starts_with(text, "0F") || starts_with(text, "0d") || starts_with(text, "0D"))
    return std::stoull(text.substr(2), nullptr, 16);
  const bool minus = text[0] == '-';
  std::string digits = text.substr(minus);
  while (!digits.empty() && (digits.back() == 'U' || digits.back() == 'u')) digits.pop_back();
  size_t read = 0;
  uint64_t value = 0;
  const bool binary = starts_with(digits, "0b") || starts_with(digits, "0B");
  try {
    value = std::stoull(binary ? digits.substr(2) : digits, &read, binary ? 2 : 0);
  } catch (const std::exception&) {
    throw Error("no operand: " + text);
  }
  if (read + (binary ? 2 : 0) != digits.size()) throw Error("no operand: " + text);
  return minus ? 0 - value : value;
}

}  // namespace ptx
