// NSObject, NSString, NSDictionary and NSError, as far as Metal's clients
// touch them.
#pragma once

#include "objc.h"

namespace metalsim {

struct String : Object {
  std::string text;
};

struct Dictionary : Object {
  std::vector<std::pair<id, id>> entries;
  ~Dictionary();
};

struct Error : Object {
  id domain = nullptr;
  int64_t code = 0;
  id user_info = nullptr;
  id description = nullptr;
  ~Error();
};

// Returned with one reference that is the caller's.
String* make_string(std::string text);
// Takes over a reference to each item.
id make_array(std::vector<id> items);
Class string_class();

// The last three members of metalsim_plan.
struct ErrorShape {
  uint32_t flags = 0;
  int64_t number = 0;
  const char* text = nullptr;
};

// The error that Metal reports for a command buffer that the GPU failed with
// this IOGPU code, in the shape that is asked for; the caller's reference.
id make_command_buffer_error(int code, const ErrorShape& shape);

inline std::string text_of(id string) {
  return string ? static_cast<String*>(string)->text : std::string();
}

}  // namespace metalsim
