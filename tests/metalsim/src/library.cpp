// What MLX needs to start its own kernels: libraries, functions, pipelines, and
// what it asks of a device. No kernel is read, and none computes anything.

#include <unistd.h>

#include "metal.h"

namespace metalsim {
namespace {

// Of an Apple GPU of family 7 or later.
constexpr uint64_t kThreadsPerGroup = 1024, kSimdWidth = 32,
                   kGroupMemory = 32768, kMaxBuffer = uint64_t{8} << 30;

struct Named : Labelled {
  id name = nullptr;
  ~Named() { objc_release(name); }
};

id named(Class cls, id name) {
  auto* object = make_object<Named>(cls);
  object->name = objc_retain(name);
  return object;
}

id get_name(id self, SEL) { return static_cast<Named*>(self)->name; }

Class named_class(const char* name, std::initializer_list<MethodSpec> methods) {
  Class made = define_class(name, labelled_class(), methods);
  add_methods(made, {{"name", "@16@0:8", imp(&get_name)}});
  set_instances<Named>(made);
  register_class(made);
  return made;
}

// ---- pipelines -------------------------------------------------------------

uint64_t pipeline_threads(id, SEL) { return kThreadsPerGroup; }
uint64_t pipeline_width(id, SEL) { return kSimdWidth; }
uint64_t pipeline_memory(id, SEL) { return 0; }

Class pipeline_class() {
  static Class cls = named_class(
      "AGXG16XFamilyComputePipeline",
      {{"maxTotalThreadsPerThreadgroup", "Q16@0:8", imp(&pipeline_threads)},
       {"threadExecutionWidth", "Q16@0:8", imp(&pipeline_width)},
       {"staticThreadgroupMemoryLength", "Q16@0:8", imp(&pipeline_memory)}});
  return cls;
}

void compile() {
  if (uint32_t us = settings().pipeline_delay_us.load()) ::usleep(us);
}

id device_new_pipeline(id, SEL, id function, id* error) {
  compile();
  if (error != nullptr) *error = nullptr;
  return named(pipeline_class(), static_cast<Named*>(function)->name);
}

id device_new_pipeline_described(id, SEL, id, uint64_t, void*, id* error) {
  compile();
  if (error != nullptr) *error = nullptr;
  return make_object<Named>(pipeline_class());
}

// ---- libraries and functions -----------------------------------------------

Class function_class() {
  static Class cls = named_class("_MTLFunction", {});
  return cls;
}

id library_function(id, SEL, id name) { return named(function_class(), name); }

id library_function_constants(id, SEL, id name, id, id* error) {
  if (error != nullptr) *error = nullptr;
  return named(function_class(), name);
}

id library_function_described(id, SEL, id, id* error) {
  if (error != nullptr) *error = nullptr;
  return make_object<Named>(function_class());
}

Class library_class() {
  static Class cls = named_class(
      "_MTLLibrary",
      {{"newFunctionWithName:", "@24@0:8@16", imp(&library_function)},
       {"newFunctionWithName:constantValues:error:", "@40@0:8@16@24^@32",
        imp(&library_function_constants)},
       {"newFunctionWithDescriptor:error:", "@32@0:8@16^@24",
        imp(&library_function_described)}});
  return cls;
}

id device_new_library(id, SEL, id, id* error) {
  if (error != nullptr) *error = nullptr;
  return make_object<Named>(library_class());
}

id device_new_library_source(id, SEL, id, id, id* error) {
  if (error != nullptr) *error = nullptr;
  return make_object<Named>(library_class());
}

// ---- descriptors, whose values nobody reads --------------------------------

void ignore_object(id, SEL, id) {}
void ignore_number(id, SEL, uint64_t) {}
void ignore_value(id, SEL, const void*, uint64_t, uint64_t) {}

id make_descriptor(id self, SEL) {
  auto* cls = static_cast<Class>(self);
  return autorelease(cls->create(cls));
}

void plain_class(const char* name, std::initializer_list<MethodSpec> methods,
                 std::initializer_list<MethodSpec> class_methods = {}) {
  Class made = define_class(name, nsobject_class(), methods, class_methods);
  set_instances<Object>(made);
  register_class(made);
}

// ---- what a device says of itself ------------------------------------------

id device_architecture(id, SEL) {
  static Class cls = named_class("MTLArchitecture", {});
  static id architecture = named(cls, make_string("applegpu_g16s"));
  return architecture;
}

BOOL device_supports_family(id, SEL, int64_t) { return true; }
BOOL device_unified(id, SEL) { return true; }
uint64_t device_max_buffer(id, SEL) { return kMaxBuffer; }
uint64_t device_group_memory(id, SEL) { return kGroupMemory; }

id device_new_heap(id, SEL, id) { return nullptr; }  // MLX does without one
id buffer_heap(id, SEL) { return nullptr; }

[[maybe_unused]] const bool classes_ready = [] {
  pipeline_class();
  library_class();
  plain_class("MTLHeapDescriptor",
              {{"setSize:", "v24@0:8Q16", imp(&ignore_number)},
               {"setResourceOptions:", "v24@0:8Q16", imp(&ignore_number)},
               {"setType:", "v24@0:8q16", imp(&ignore_number)}});
  plain_class("MTLCompileOptions",
              {{"setFastMathEnabled:", "v20@0:8B16", imp(&ignore_number)},
               {"setMathMode:", "v24@0:8q16", imp(&ignore_number)},
               {"setLanguageVersion:", "v24@0:8Q16", imp(&ignore_number)}});
  plain_class("MTLFunctionConstantValues",
              {{"setConstantValue:type:atIndex:", "v40@0:8r^v16Q24Q32",
                imp(&ignore_value)}});
  plain_class("MTLFunctionDescriptor",
              {{"setName:", "v24@0:8@16", imp(&ignore_object)},
               {"setSpecializedName:", "v24@0:8@16", imp(&ignore_object)},
               {"setConstantValues:", "v24@0:8@16", imp(&ignore_object)}},
              {{"functionDescriptor", "@16@0:8", imp(&make_descriptor)}});
  for (int family = 0; family < kFamilies; ++family) {
    add_methods(
        device_class(family),
        {{"newLibraryWithURL:error:", "@32@0:8@16^@24",
          imp(&device_new_library)},
         {"newLibraryWithFile:error:", "@32@0:8@16^@24",
          imp(&device_new_library)},
         {"newLibraryWithSource:options:error:", "@40@0:8@16@24^@32",
          imp(&device_new_library_source)},
         {"newComputePipelineStateWithFunction:error:", "@32@0:8@16^@24",
          imp(&device_new_pipeline)},
         {"newComputePipelineStateWithDescriptor:options:reflection:error:",
          "@48@0:8@16Q24^@32^@40", imp(&device_new_pipeline_described)},
         {"architecture", "@16@0:8", imp(&device_architecture)},
         {"supportsFamily:", "B24@0:8q16", imp(&device_supports_family)},
         {"hasUnifiedMemory", "B16@0:8", imp(&device_unified)},
         {"maxBufferLength", "Q16@0:8", imp(&device_max_buffer)},
         {"maxThreadgroupMemoryLength", "Q16@0:8", imp(&device_group_memory)},
         {"newHeapWithDescriptor:", "@24@0:8@16", imp(&device_new_heap)}});
    add_methods(buffer_class(family), {{"heap", "@16@0:8", imp(&buffer_heap)}});
  }
  return true;
}();

}  // namespace
}  // namespace metalsim
