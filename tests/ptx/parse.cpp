// Text to Program. What PTX calls a statement ends with a semicolon, but for labels, .loc and .file.
#include <algorithm>
#include <cctype>
#include <cstring>

#include "operand.h"
#include "program.h"
#include "text.h"

namespace ptx {
namespace {

bool is_word(char c) { return std::isalnum(static_cast<unsigned char>(c)) || c == '_' || c == '$' || c == '%'; }

}  // namespace

bool Instruction::has(const char* part) const { return std::find(parts.begin(), parts.end(), part) != parts.end(); }

class Parser {
 public:
  Parser(const std::string& text, Program& program) : text_(without_comments(text)), program_(program) {}

  void run() {
    while (skip_space()) {
      const std::string start = word_ahead();
      if (start == ".version" || start == ".target" || start == ".address_size" || start == ".file") {
        until('\n');
      } else if (start == ".section") {
        at_ = text_.find('{', at_);
        skip_braces();
      } else {
        top_level();
      }
    }
  }

 private:
  // ---- reading -----------------------------------------------------------------------------------------------------

  bool skip_space() {
    while (at_ < text_.size() && std::isspace(static_cast<unsigned char>(text_[at_]))) ++at_;
    return at_ < text_.size();
  }
  std::string word_ahead() const {
    size_t end = at_;
    while (end < text_.size() && (is_word(text_[end]) || text_[end] == '.')) ++end;
    return text_.substr(at_, end - at_);
  }
  std::string until(char c) {  // and past it
    const size_t end = std::min(text_.find(c, at_), text_.size());
    std::string part = text_.substr(at_, end - at_);
    at_ = std::min(end + 1, text_.size());
    return part;
  }
  void skip_braces() {  // at_ is at the opening one
    int depth = 0;
    do {
      depth += (text_[at_] == '{') - (text_[at_] == '}');
    } while (++at_ < text_.size() && depth);
  }
  int line() const { return int(std::count(text_.begin(), text_.begin() + long(at_), '\n')) + 1; }

  // ---- declarations ------------------------------------------------------------------------------------------------

  void top_level() {
    const size_t end = text_.find_first_of(";({", at_);
    const std::string head = end == std::string::npos ? "" : trimmed(text_.substr(at_, end - at_));
    if (head.find(".entry ") != std::string::npos) {
      at_ = end + 1;
      entry(head.substr(head.rfind(' ') + 1));
    } else if (head.find(".func") != std::string::npos) {  // a call of it will be an unknown instruction
      at_ = text_.find_first_of(";{", at_);
      text_[at_] == '{' ? skip_braces() : void(++at_);
    } else {
      variable(trimmed(until(';')), nullptr);
    }
  }

  // .shared .align 4 .b8 name[128]   .const .align 8 .b8 name[2] = {1, 2}   .local ...   kernel: inside a body
  void variable(const std::string& statement, Kernel* kernel) {
    const size_t equals = statement.find('=');
    const std::string head = trimmed(statement.substr(0, equals));
    size_t align = 1, count = 1;
    int bits = 0;
    std::string name, space;
    const std::vector<std::string> words = split(head, ' ');
    for (size_t i = 0; i < words.size(); ++i) {
      const std::string& word = words[i];
      if (word == ".align") {
        align = std::stoul(words[++i]);
      } else if (word == ".shared" || word == ".const" || word == ".global" || word == ".local") {
        space = word.substr(1);
      } else if (word[0] == '.') {
        if (word != ".extern" && word != ".visible" && word != ".weak") bits = bits_of(word.substr(1));
      } else {
        name = word;
      }
    }
    if (space.empty() || name.empty()) throw Error("line " + std::to_string(line()) + ": what is " + statement + "?");
    const size_t bracket = name.find('[');
    const bool open = bracket != std::string::npos && name[bracket + 1] == ']';  // what the launch gives
    if (bracket != std::string::npos && !open) count = std::stoul(name.substr(bracket + 1));
    name = name.substr(0, bracket);
    const size_t bytes = count * size_t(bits) / 8;
    align = std::max(align, size_t(bits) / 8);
    if (space == "shared") {
      shared_.push_back({name, open ? 0 : bytes, align});
    } else if (space == "local") {
      local_bytes_ = (local_bytes_ + align - 1) / align * align;
      names_.symbols[name] = local_bytes_;
      local_bytes_ += bytes;
    } else {
      std::vector<uint64_t>& data = program_.variables_[name];
      data.resize((bytes + 7) / 8 + 1);
      if (equals != std::string::npos) initialise(statement.substr(equals + 1), data, size_t(bits) / 8);
      names_.symbols[name] = reinterpret_cast<uint64_t>(data.data());
    }
    if (kernel == nullptr && space == "local") throw Error("local variables belong into kernels: " + statement);
  }

  void initialise(std::string values, std::vector<uint64_t>& data, size_t bytes) {
    values.erase(std::remove_if(values.begin(), values.end(), [](char c) { return c == '{' || c == '}'; }),
                 values.end());
    size_t i = 0;
    for (const std::string& value : split(values)) {
      const uint64_t number = literal(value);
      std::memcpy(reinterpret_cast<char*>(data.data()) + bytes * i++, &number, bytes);
    }
  }

  void parameters(Kernel& kernel, const std::string& list) {
    for (const std::string& declaration : split(list)) {
      size_t align = 0, count = 1;
      int bits = 0;
      bool pointer = false;
      const std::vector<std::string> words = split(declaration, ' ');
      for (size_t i = 1; i + 1 < words.size(); ++i) {
        if (words[i] == ".align") {  // behind .ptr, of what it points to
          const size_t number = std::stoul(words[++i]);
          if (!pointer) align = number;
        } else if (words[i] == ".ptr") {
          pointer = true;
        } else if (!pointer) {
          bits = bits_of(words[i].substr(1));
        }
      }
      std::string name = words.back();
      const size_t bracket = name.find('[');
      if (bracket != std::string::npos) count = std::stoul(name.substr(bracket + 1));
      name = name.substr(0, bracket);
      const size_t bytes = count * size_t(bits) / 8;
      align = std::max({align, size_t(bits) / 8, size_t(1)});
      const size_t offset = (kernel.parameter_bytes + align - 1) / align * align;
      kernel.parameters.push_back({name, offset, bytes});
      kernel.parameter_bytes = offset + bytes;
      names_.symbols[name] = offset;
    }
  }

  // ---- kernels -----------------------------------------------------------------------------------------------------

  void entry(const std::string& name) {
    Kernel kernel;
    kernel.name = name;
    const auto outer = names_.symbols;
    const size_t shared_before = shared_.size();
    local_bytes_ = 0;
    labels_.clear();
    tables_.clear();
    if (text_[at_ - 1] == '(') parameters(kernel, until(')'));
    at_ = text_.find('{', at_) + 1;  // past .maxntid and the like
    names_.scopes.assign(1, {});
    // Symbols of shared memory are known only once all of it is declared.
    const size_t begin = at_;
    while (!names_.scopes.empty()) statement(kernel, true);
    place_shared(kernel);
    at_ = begin;
    kernel.register_bytes = 0;
    local_bytes_ = 0;
    names_.scopes.assign(1, {});
    while (!names_.scopes.empty()) statement(kernel, false);
    for (Instruction& instruction : kernel.code) resolve(instruction);
    kernel.local_bytes = local_bytes_;
    shared_.resize(shared_before);
    names_.symbols = outer;
    program_.kernels_[name] = std::move(kernel);
  }

  void place_shared(Kernel& kernel) {
    size_t end = 0;
    for (const bool open : {false, true}) {  // what the launch gives comes last
      for (const Shared& s : shared_) {
        if ((s.bytes == 0) != open) continue;
        end = (end + s.align - 1) / s.align * s.align;
        names_.symbols[s.name] = end;
        end += s.bytes;
      }
    }
    kernel.static_shared = end;
  }

  void resolve(Instruction& instruction) {
    for (const std::string& label : instruction.labels) {
      if (!labels_.count(label)) throw Error("no label " + label + ": " + instruction.text);
      instruction.targets.push_back(labels_[label]);
    }
  }

  // One statement of a body. The first time round only variables are looked at.
  void statement(Kernel& kernel, bool declarations) {
    if (!skip_space()) throw Error(kernel.name + " has no end");
    if (text_[at_] == '{' || text_[at_] == '}') {
      text_[at_++] == '{' ? names_.scopes.push_back({}) : names_.scopes.pop_back();
      return;
    }
    if (text_[at_] == ';') {
      ++at_;
      return;
    }
    const std::string start = word_ahead();
    if (start == ".loc" || start == ".file") {
      until('\n');
      return;
    }
    const size_t colon = at_ + start.size();
    if (start.find('.') == std::string::npos && text_[colon] == ':' && text_[colon + 1] != ':') {
      at_ = colon + 1;
      if (!declarations) labels_[last_label_ = start] = uint32_t(kernel.code.size());
      return;
    }
    const int here = declarations ? 0 : line_from(kernel);
    const std::string text = trimmed(until(';'));
    if (start == ".shared" || start == ".local") {
      if (declarations || start == ".local") variable(text, &kernel);
    } else if (declarations || start == ".pragma") {
    } else if (start == ".reg") {
      registers(kernel, text);
    } else if (start == ".branchtargets") {
      tables_[last_label_] = split(text.substr(start.size()));
    } else if (text[0] == '.') {
      throw Error("line " + std::to_string(here) + ": what is " + text + "?");
    } else {
      kernel.code.push_back(instruction(text, here));
    }
  }

  int line_from(const Kernel& kernel) {  // counts on from the last one
    if (kernel.code.empty()) {
      line_at_ = at_;
      return line_ = line();
    }
    line_ += int(std::count(text_.begin() + long(line_at_), text_.begin() + long(at_), '\n'));
    line_at_ = at_;
    return line_;
  }

  void registers(Kernel& kernel, const std::string& text) {  // .reg .b32 %r<12>   .reg .pred p, q
    const size_t type_end = text.find(' ', 5);
    const int bits = bits_of(text.substr(6, type_end - 6));
    const auto add = [&](const std::string& name) {
      names_.scopes.back()[name] = {uint32_t(kernel.register_bytes), bits};
      kernel.register_bytes += bits == 1 ? 8 : kWarp * size_t(bits) / 8;
    };
    for (const std::string& name : split(text.substr(type_end))) {
      const size_t bracket = name.find('<');
      if (bracket == std::string::npos) {
        add(name);
      } else {
        for (int i = 0; i < std::stoi(name.substr(bracket + 1)); ++i) add(name.substr(0, bracket) + std::to_string(i));
      }
    }
  }

  Instruction instruction(std::string text, int where) {
    Instruction made;
    made.text = text;
    made.line = where;
    if (text[0] == '@') {
      const size_t end = text.find(' ');
      made.guarded = true;
      made.guard = names_.operand(text.substr(1, end - 1));
      text = trimmed(text.substr(end));
    }
    const size_t end = std::min(text.find(' '), text.size());
    std::string opcode = text.substr(0, end);
    for (size_t i; (i = opcode.find("::")) != std::string::npos;)
      opcode[i] = opcode[i + 1] = '_';  // L2::128B: one part
    made.parts = split(opcode, '.');
    const std::string arguments = trimmed(text.substr(end));
    if (made.parts[0] == "bra") {
      made.labels = {arguments};
    } else if (made.parts[0] == "brx") {
      const std::vector<std::string> both = split(arguments);
      made.operands.push_back(names_.operand(both[0]));
      made.labels = tables_[both[1]];
    } else if (made.parts[0] != "call") {
      try {
        for (const std::string& one : split(arguments)) made.operands.push_back(names_.operand(one));
      } catch (const Error& error) {
        throw Error("line " + std::to_string(where) + ": " + error.what() + ": " + text);
      }
    }
    return made;
  }

  struct Shared {
    std::string name;
    size_t bytes, align;
  };

  std::string text_;
  Program& program_;
  size_t at_ = 0, line_at_ = 0, local_bytes_ = 0;
  int line_ = 0;
  std::string last_label_;
  Names names_;
  std::map<std::string, uint32_t> labels_;
  std::map<std::string, std::vector<std::string>> tables_;
  std::vector<Shared> shared_;
};

Program::Program(const std::string& text) { Parser(text, *this).run(); }

Kernel& Program::kernel(const std::string& name) {
  const auto found = kernels_.find(name);
  if (found == kernels_.end()) throw Error("the module has no kernel " + name);
  return found->second;
}

std::vector<std::pair<uint64_t, uint64_t>> Program::variables() const {
  std::vector<std::pair<uint64_t, uint64_t>> found;
  for (const auto& [name, data] : variables_)
    found.emplace_back(reinterpret_cast<uint64_t>(data.data()), 8 * data.size());
  return found;
}

}  // namespace ptx
