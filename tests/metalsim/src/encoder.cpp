// MTLComputeCommandEncoder. A dispatch takes simulated time and may run a
// function of the test's, standing for a kernel that writes memory.

#include "metal.h"

namespace metalsim {
namespace {

struct MTLSize {
  uint64_t width, height, depth;
};

ComputeEncoder* open_encoder(id self, SEL sel) {
  auto* encoder = static_cast<ComputeEncoder*>(self);
  if (encoder->ended) fail_assertion(self, sel, "encoder has already ended");
  return encoder;
}

void encoder_end(id self, SEL sel) {
  auto* encoder = open_encoder(self, sel);
  encoder->ended = true;
  encoder->buffer->encoding = false;
}

void add_dispatch(id self, SEL sel, Kernel kernel, void* context,
                  uint64_t microseconds) {
  Command command{Command::kDispatch,
                  static_cast<uint32_t>(microseconds),
                  nullptr,
                  0,
                  kernel,
                  context};
  open_encoder(self, sel)->buffer->commands.push_back(command);
}

void encoder_dispatch(id self, SEL sel, uint64_t microseconds) {
  add_dispatch(self, sel, nullptr, nullptr, microseconds);
}

void encoder_dispatch_kernel(id self, SEL sel, Kernel kernel, void* context,
                             uint64_t microseconds) {
  add_dispatch(self, sel, kernel, context, microseconds);
}

void encoder_dispatch_groups(id self, SEL sel, MTLSize, MTLSize) {
  add_dispatch(self, sel, nullptr, nullptr, 0);
}

void encoder_use(id self, SEL sel, id resource, uint64_t) {
  auto* buffer = static_cast<Buffer*>(resource);
  open_encoder(self, sel)->buffer->use(buffer, buffer->length);
}

void encoder_set_buffer(id self, SEL sel, id resource, uint64_t, uint64_t) {
  encoder_use(self, sel, resource, 0);
}

void encoder_set_pipeline(id self, SEL sel, id) { open_encoder(self, sel); }
void encoder_set_bytes(id self, SEL sel, const void*, uint64_t, uint64_t) {
  open_encoder(self, sel);
}
void encoder_set_memory(id self, SEL sel, uint64_t, uint64_t) {
  open_encoder(self, sel);
}
void encoder_barrier(id self, SEL sel, uint64_t) { open_encoder(self, sel); }
void encoder_fence(id self, SEL sel, id) { open_encoder(self, sel); }

Class metal_encoder_class() {
  static Class cls = [] {
    Class base = define_class("_MTLCommandEncoder", labelled_class(),
                              {{"endEncoding", "v16@0:8", imp(&encoder_end)}});
    Class made = define_class(
        "IOGPUMetalComputeCommandEncoder", base,
        {{"dispatchSimulatedMicroseconds:", "v24@0:8Q16",
          imp(&encoder_dispatch)},
         {"dispatchSimulatedKernel:context:microseconds:", "v40@0:8^?16^v24Q32",
          imp(&encoder_dispatch_kernel)},
         {"dispatchThreadgroups:threadsPerThreadgroup:",
          "v64@0:8{?=QQQ}16{?=QQQ}40", imp(&encoder_dispatch_groups)},
         {"dispatchThreads:threadsPerThreadgroup:", "v64@0:8{?=QQQ}16{?=QQQ}40",
          imp(&encoder_dispatch_groups)},
         {"useResource:usage:", "v32@0:8@16Q24", imp(&encoder_use)},
         {"setBuffer:offset:atIndex:", "v40@0:8@16Q24Q32",
          imp(&encoder_set_buffer)},
         {"setComputePipelineState:", "v24@0:8@16", imp(&encoder_set_pipeline)},
         {"setBytes:length:atIndex:", "v40@0:8r^v16Q24Q32",
          imp(&encoder_set_bytes)},
         {"setThreadgroupMemoryLength:atIndex:", "v32@0:8Q16Q24",
          imp(&encoder_set_memory)},
         {"memoryBarrierWithScope:", "v24@0:8Q16", imp(&encoder_barrier)},
         {"waitForFence:", "v24@0:8@16", imp(&encoder_fence)},
         {"updateFence:", "v24@0:8@16", imp(&encoder_fence)}});
    set_instances<ComputeEncoder>(made);
    return made;
  }();
  return cls;
}

}  // namespace

ComputeEncoder::~ComputeEncoder() {
  if (!ended) {
    fail_assertion(this, sel_registerName("dealloc"),
                   "Command encoder released without endEncoding");
  }
  objc_release(buffer);
}

Class encoder_class(int family) {
  static Class classes[kFamilies] = {
      define_class("AGXG16XFamilyComputeContext", metal_encoder_class(), {}),
      define_class("AGXG17XFamilyComputeContext", metal_encoder_class(), {})};
  return classes[family];
}

}  // namespace metalsim
