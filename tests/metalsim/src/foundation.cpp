#include "foundation.h"

#include <cstdio>
#include <mutex>
#include <utility>

#include "../metalsim.h"

namespace metalsim {
namespace {

// ---- NSObject --------------------------------------------------------------

id object_retain(id self, SEL) { return objc_retain(self); }
void object_release(id self, SEL) { objc_release(self); }
id object_autorelease(id self, SEL) { return autorelease(self); }
id object_self(id self, SEL) { return self; }
id object_class_of(id self, SEL) {
  return self->isa->meta ? self : static_cast<id>(self->isa);
}
id object_superclass(id self, SEL) { return self->isa->super; }
uint64_t object_hash(id self, SEL) { return reinterpret_cast<uintptr_t>(self); }
BOOL object_is_equal(id self, SEL, id other) { return self == other; }
void object_dealloc(id self, SEL) {
  dispose_object(static_cast<Object*>(self));
}

uint64_t object_retain_count(id self, SEL) {
  if (self->isa->meta || self->isa->block) return UINT64_MAX;
  return static_cast<uint64_t>(static_cast<Object*>(self)->refs.load());
}

BOOL object_responds(id self, SEL, SEL asked) {
  return class_getInstanceMethod(self->isa, asked) != nullptr;
}

BOOL object_is_kind_of(id self, SEL, Class cls) {
  return is_kind_of(self, cls);
}

id object_description(id self, SEL) {
  char text[160];
  std::snprintf(text, sizeof text, "<%s: %p>", self->isa->name.c_str(),
                static_cast<void*>(self));
  return autorelease(make_string(text));
}

id class_alloc(id self, SEL) {
  auto* cls = static_cast<Class>(self);
  return cls->create ? cls->create(cls) : nullptr;
}

id class_new(id self, SEL) {
  static SEL alloc = sel_registerName("alloc");
  static SEL init = sel_registerName("init");
  return send<id>(send<id>(self, alloc), init);
}

id class_name(id self, SEL) {
  return autorelease(make_string(static_cast<Class>(self)->name));
}

// ---- NSString --------------------------------------------------------------

const char* string_utf8(id self, SEL) {
  return static_cast<String*>(self)->text.c_str();
}

uint64_t string_length(id self, SEL) {
  return static_cast<String*>(self)->text.size();
}

id string_with_utf8(id, SEL, const char* text) {
  return text ? autorelease(make_string(text)) : nullptr;
}

bool same_text(id one, id other) {
  return is_kind_of(other, string_class()) && text_of(one) == text_of(other);
}

BOOL string_is_equal(id self, SEL, id other) { return same_text(self, other); }

// ---- NSDictionary ----------------------------------------------------------

id dictionary_object_for_key(id self, SEL, id key) {
  static SEL is_equal = sel_registerName("isEqual:");
  for (auto [mine, value] : static_cast<Dictionary*>(self)->entries) {
    if (send<BOOL>(mine, is_equal, key)) return value;
  }
  return nullptr;
}

uint64_t dictionary_count(id self, SEL) {
  return static_cast<Dictionary*>(self)->entries.size();
}

Class dictionary_class() {
  static Class cls = [] {
    IMP get = imp(&dictionary_object_for_key);
    Class made = define_class("NSDictionary", nsobject_class(),
                              {{"objectForKey:", "@24@0:8@16", get},
                               {"objectForKeyedSubscript:", "@24@0:8@16", get},
                               {"valueForKey:", "@24@0:8@16", get},
                               {"count", "Q16@0:8", imp(&dictionary_count)}});
    set_instances<Dictionary>(made);
    register_class(made);
    return made;
  }();
  return cls;
}

// ---- NSError ---------------------------------------------------------------

id error_domain(id self, SEL) { return static_cast<Error*>(self)->domain; }
int64_t error_code(id self, SEL) { return static_cast<Error*>(self)->code; }
id error_user_info(id self, SEL) {
  return static_cast<Error*>(self)->user_info;
}
id error_text(id self, SEL) { return static_cast<Error*>(self)->description; }

Class error_class() {
  static Class cls = [] {
    Class made =
        define_class("NSError", nsobject_class(),
                     {{"domain", "@16@0:8", imp(&error_domain)},
                      {"code", "q16@0:8", imp(&error_code)},
                      {"userInfo", "@16@0:8", imp(&error_user_info)},
                      {"localizedDescription", "@16@0:8", imp(&error_text)}});
    set_instances<Error>(made);
    register_class(made);
    return made;
  }();
  return cls;
}

struct KnownCode {
  int code;            // IOGPUCommandQueueErrorDomain
  int metal_code;      // MTLCommandBufferErrorDomain
  const char* name;    // without the common prefix
  const char* phrase;  // as Metal words it
};

constexpr KnownCode kKnownCodes[] = {
    {0x2, 2, "Timeout", "Caused GPU Timeout Error"},
    {0x3, 2, "Hang", "Caused GPU Hang Error"},
    {0x4, 4, "SubmissionsIgnored",
     "Ignored (for causing prior/excessive GPU errors)"},
    {0x5, 1, "InnocentVictim", "Discarded (victim of GPU error/recovery)"},
    {0x6, 7, "BackgroundExecutionNotPermitted",
     "Insufficient Permission (to submit GPU work from background)"},
    {0x8, 8, "OutOfMemory", "Insufficient Memory"},
    {0x9, 9, "InvalidResource", "Invalid Resource"},
    {0xa, 1, "InvalidInput", "Invalid Input"},
    {0xb, 3, "PageFault", "Caused GPU Address Fault Error"},
    {0xe, 1, "ImpactingInteractivity", "Impacting Interactivity"},
    {0x10, 1, "ProtectionViolation", "Protection Violation"},
    {0x11, 12, "StackOverflow", "Stack Overflow"},
};

std::string describe(int code, const KnownCode* known) {
  char text[200];
  if (known == nullptr) {
    std::snprintf(text, sizeof text, "Internal Error (%08x:Internal Error)",
                  static_cast<unsigned>(code));
  } else {
    std::snprintf(text, sizeof text,
                  "%s (%08x:kIOGPUCommandBufferCallbackError%s)", known->phrase,
                  static_cast<unsigned>(code), known->name);
  }
  return text;
}

Error* make_error(const char* domain, int64_t code, const std::string& text) {
  auto* error = make_object<Error>(error_class());
  error->domain = make_string(domain);
  error->code = code;
  error->description = make_string(text);
  error->user_info = make_object<Dictionary>(dictionary_class());
  return error;
}

// Both references pass to the dictionary.
void put(id dictionary, const char* key, id value) {
  auto& entries = static_cast<Dictionary*>(dictionary)->entries;
  entries.emplace_back(make_string(key), value);
}

// What stands under NSUnderlyingErrorKey.
id make_cause(int code, const std::string& text, const ErrorShape& shape) {
  if (shape.flags & METALSIM_ERROR_NO_UNDERLYING) return nullptr;
  if (shape.flags & METALSIM_ERROR_UNDERLYING_STRING) return make_string(text);
  int64_t number = shape.number ? shape.number : code;
  Error* cause = make_error("IOGPUCommandQueueErrorDomain", number, text);
  put(cause->user_info, "NSLocalizedDescription", make_string(text));
  return cause;
}

// Strings, errors and so on must be known by name before one exists.
[[maybe_unused]] const bool classes_ready = [] {
  string_class();
  dictionary_class();
  error_class();
  return true;
}();

}  // namespace

Class string_class() {
  static Class cls = [] {
    Class made = define_class(
        "NSString", nsobject_class(),
        {{"UTF8String", "r*16@0:8", imp(&string_utf8)},
         {"length", "Q16@0:8", imp(&string_length)},
         {"isEqualToString:", "B24@0:8@16", imp(&string_is_equal)},
         {"isEqual:", "B24@0:8@16", imp(&string_is_equal)},
         {"description", "@16@0:8", imp(&object_self)},
         {"copy", "@16@0:8", imp(&object_retain)}},
        {{"stringWithUTF8String:", "@24@0:8r*16", imp(&string_with_utf8)}});
    set_instances<String>(made);
    register_class(made);
    return made;
  }();
  return cls;
}

Dictionary::~Dictionary() {
  for (auto [key, value] : entries) {
    objc_release(key);
    objc_release(value);
  }
}

Error::~Error() {
  for (id part : {domain, user_info, description}) objc_release(part);
}

String* make_string(std::string text) {
  auto* string = make_object<String>(string_class());
  string->text = std::move(text);
  return string;
}

id make_command_buffer_error(int code, const ErrorShape& shape) {
  if (shape.flags & METALSIM_ERROR_NIL) return nullptr;
  const KnownCode* known = nullptr;
  for (const KnownCode& entry : kKnownCodes) {
    if (entry.code == code) known = &entry;
  }
  std::string text = shape.text ? shape.text : describe(code, known);
  int metal_code = known ? known->metal_code : 1;
  Error* error = make_error("MTLCommandBufferErrorDomain", metal_code, text);
  put(error->user_info, "NSLocalizedDescription", make_string(text));
  if (id cause = make_cause(code, text, shape)) {
    put(error->user_info, "NSUnderlyingError", cause);
  }
  if (shape.flags & METALSIM_ERROR_NO_DESCRIPTION) {
    objc_release(std::exchange(error->description, nullptr));
  }
  if (shape.flags & METALSIM_ERROR_NO_USER_INFO) {
    objc_release(std::exchange(error->user_info, nullptr));
  } else if (shape.flags & METALSIM_ERROR_USER_INFO_STRING) {
    objc_release(std::exchange(error->user_info, make_string("no dictionary")));
  }
  return error;
}

Class nsobject_class() {
  static Class cls = [] {
    Class made = define_class(
        "NSObject", nullptr,
        {{"retain", "@16@0:8", imp(&object_retain)},
         {"release", "Vv16@0:8", imp(&object_release)},
         {"autorelease", "@16@0:8", imp(&object_autorelease)},
         {"retainCount", "Q16@0:8", imp(&object_retain_count)},
         {"dealloc", "v16@0:8", imp(&object_dealloc)},
         {"init", "@16@0:8", imp(&object_self)},
         {"self", "@16@0:8", imp(&object_self)},
         {"class", "#16@0:8", imp(&object_class_of)},
         {"superclass", "#16@0:8", imp(&object_superclass)},
         {"hash", "Q16@0:8", imp(&object_hash)},
         {"isEqual:", "B24@0:8@16", imp(&object_is_equal)},
         {"isKindOfClass:", "B24@0:8#16", imp(&object_is_kind_of)},
         {"respondsToSelector:", "B24@0:8:16", imp(&object_responds)},
         {"description", "@16@0:8", imp(&object_description)}},
        {{"alloc", "@16@0:8", imp(&class_alloc)},
         {"new", "@16@0:8", imp(&class_new)},
         {"description", "@16@0:8", imp(&class_name)}});
    set_instances<Object>(made);
    register_class(made);
    return made;
  }();
  return cls;
}

}  // namespace metalsim
