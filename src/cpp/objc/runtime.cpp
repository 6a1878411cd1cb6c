#include "objc/runtime.h"

#include <dlfcn.h>

#include <cstdlib>
#include <mutex>
#include <vector>

namespace mlx_safe::objc {
namespace {

// Never destroyed: hooked methods are called until the process is gone.
Runtime& storage() {
  static auto* found = new Runtime;
  return *found;
}

bool g_loaded = false;

// The libraries to look in, opened; empty, and why, when there is none.
std::vector<void*> open_libraries(std::string* path, std::string* why_not) {
#if defined(__APPLE__)
  const char* const names[] = {
      "/usr/lib/libobjc.A.dylib", "/usr/lib/libSystem.B.dylib",
      "/System/Library/Frameworks/Metal.framework/Metal"};
  *path = names[0];
#else
  const char* simulated = std::getenv("MLX_SAFE_METAL_RUNTIME");
  if (simulated == nullptr || *simulated == '\0') {
    *why_not =
        "no Metal on this system, so nothing to hook: MLX raises what fails "
        "here as an exception";
    return {};
  }
  const char* const names[] = {simulated};
  *path = simulated;
#endif
  std::vector<void*> libraries;
  for (const char* name : names) {
    void* library = ::dlopen(name, RTLD_NOW | RTLD_GLOBAL);
    if (library == nullptr) {
      const char* error = ::dlerror();
      *why_not = std::string("Metal is not hooked: ") +
                 (error == nullptr ? name : error);
      return {};
    }
    libraries.push_back(library);  // stays open: its code is in use
  }
  return libraries;
}

void* find(const std::vector<void*>& libraries, const char* name) {
  for (void* library : libraries)
    if (void* symbol = ::dlsym(library, name)) return symbol;
  return nullptr;
}

}  // namespace

const Runtime& runtime() noexcept { return storage(); }

bool load_runtime(std::string* why_not) {
  static std::mutex mutex;
  std::lock_guard lock(mutex);
  if (g_loaded) return true;
  Runtime candidate;
  auto libraries = open_libraries(&candidate.path, why_not);
  if (libraries.empty()) return false;
  const char* missing = nullptr;
#define MLX_SAFE_FIND(result, name, parameters)                       \
  candidate.name =                                                    \
      reinterpret_cast<result(*) parameters>(find(libraries, #name)); \
  if (candidate.name == nullptr) missing = #name;
  MLX_SAFE_RUNTIME_FUNCTIONS(MLX_SAFE_FIND)
#undef MLX_SAFE_FIND
  candidate.stack_block_class = find(libraries, "_NSConcreteStackBlock");
  if (candidate.stack_block_class == nullptr) missing = "_NSConcreteStackBlock";
  if (missing != nullptr) {
    *why_not = "Metal is not hooked: " + candidate.path + " has no " + missing;
    return false;
  }
  storage() = candidate;
  g_loaded = true;
  return true;
}

bool responds(Id object, Selector selector) noexcept {
  if (object == nullptr) return false;
  const Runtime& r = runtime();
  return r.class_getInstanceMethod(r.object_getClass(object), selector) !=
         nullptr;
}

const char* utf8(Id string) noexcept {
  static Selector selector = runtime().sel_registerName("UTF8String");
  return string == nullptr ? nullptr : send<const char*>(string, selector);
}

}  // namespace mlx_safe::objc
