// The Objective-C runtime of tests that need none: objects are numbers, and
// only their references are counted.
#include "plain_objects.h"

#include "objc/runtime.h"

namespace plain_objects {
long references = 0;
}

namespace mlx_safe::objc {

const Runtime& runtime() noexcept {
  static const Runtime found = [] {
    Runtime r;
    r.objc_retain = [](Id object) {
      ++plain_objects::references;
      return object;
    };
    r.objc_release = [](Id) { --plain_objects::references; };
    return r;
  }();
  return found;
}

}  // namespace mlx_safe::objc
