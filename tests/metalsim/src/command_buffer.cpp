// MTLCommandBuffer: encoding, committing, waiting, and the two families'
// overrides.

#include "metal.h"

namespace metalsim {
namespace {

CommandBuffer* as_buffer(id self) { return static_cast<CommandBuffer*>(self); }

CommandBuffer* uncommitted(id self, SEL sel, const char* complaint) {
  auto* buffer = as_buffer(self);
  if (buffer->status.load() >= kCommitted) {
    fail_assertion(self, sel, complaint);
  }
  return buffer;
}

CommandBuffer* not_encoding(id self, SEL sel) {
  auto* buffer = uncommitted(self, sel, "command buffer is committed");
  if (buffer->encoding) {
    fail_assertion(self, sel, "uncommitted encoder in progress");
  }
  return buffer;
}

// ---- _MTLCommandBuffer -----------------------------------------------------

void buffer_add_completed(id self, SEL sel, const void* block) {
  auto* buffer =
      uncommitted(self, sel, "Completed handler provided after commit call");
  buffer->completed_handlers.push_back(_Block_copy(block));
  ++buffer->record.handlers_added;
  count(totals().handlers_added);
}

void buffer_add_scheduled(id self, SEL sel, const void* block) {
  auto* buffer =
      uncommitted(self, sel, "Scheduled handler provided after commit call");
  buffer->scheduled_handlers.push_back(_Block_copy(block));
}

void buffer_commit(id self, SEL sel) {
  auto* buffer =
      uncommitted(self, sel, "Commit an already committed command buffer");
  if (buffer->encoding) {
    fail_assertion(self, sel, "commit command buffer with uncommitted encoder");
  }
  submit(buffer);
}

void buffer_enqueue(id self, SEL sel) {
  auto* buffer = uncommitted(self, sel, "enqueue after commit");
  if (buffer->status.load() == kNotEnqueued) reserve_turn(buffer);
}

void wait_for(id self, SEL sel, bool handlers) {
  auto* buffer = as_buffer(self);
  if (buffer->status.load() < kCommitted) {
    fail_assertion(self, sel, "waiting for an uncommitted command buffer");
  }
  std::unique_lock guard(buffer->lock);
  buffer->changed.wait(guard, [&] {
    return handlers ? buffer->handlers_done
                    : buffer->status.load() >= kScheduled;
  });
}

void buffer_wait_completed(id self, SEL sel) { wait_for(self, sel, true); }
void buffer_wait_scheduled(id self, SEL sel) { wait_for(self, sel, false); }

uint64_t buffer_status(id self, SEL) {
  return as_buffer(self)->status.load(std::memory_order_acquire);
}

id buffer_error(id self, SEL) {
  auto* buffer = as_buffer(self);
  // The error is set before the status.
  return buffer->status.load() == kError ? buffer->error : nullptr;
}

id buffer_queue(id self, SEL) { return as_buffer(self)->queue; }
id buffer_device(id self, SEL) { return as_buffer(self)->queue->device; }
double buffer_gpu_start(id self, SEL) { return as_buffer(self)->gpu_start; }
double buffer_gpu_end(id self, SEL) { return as_buffer(self)->gpu_end; }
BOOL buffer_retains(id self, SEL) { return as_buffer(self)->retains; }
uint64_t buffer_error_options(id self, SEL) {
  return as_buffer(self)->error_options;
}

Class metal_command_buffer_class();

// The real classes have one too, for what they hold.
void buffer_dealloc(id self, SEL cmd) {
  send_super(metal_command_buffer_class(), self, cmd);
}

Class metal_command_buffer_class() {
  static Class cls = [] {
    Class made = define_class(
        "_MTLCommandBuffer", labelled_class(),
        {{"addCompletedHandler:", "v24@0:8@?16", imp(&buffer_add_completed)},
         {"addScheduledHandler:", "v24@0:8@?16", imp(&buffer_add_scheduled)},
         {"commit", "v16@0:8", imp(&buffer_commit)},
         {"dealloc", "v16@0:8", imp(&buffer_dealloc)},
         {"enqueue", "v16@0:8", imp(&buffer_enqueue)},
         {"waitUntilCompleted", "v16@0:8", imp(&buffer_wait_completed)},
         {"waitUntilScheduled", "v16@0:8", imp(&buffer_wait_scheduled)},
         {"status", "Q16@0:8", imp(&buffer_status)},
         {"error", "@16@0:8", imp(&buffer_error)},
         {"commandQueue", "@16@0:8", imp(&buffer_queue)},
         {"device", "@16@0:8", imp(&buffer_device)},
         {"GPUStartTime", "d16@0:8", imp(&buffer_gpu_start)},
         {"GPUEndTime", "d16@0:8", imp(&buffer_gpu_end)},
         {"retainedReferences", "B16@0:8", imp(&buffer_retains)},
         {"errorOptions", "Q16@0:8", imp(&buffer_error_options)}});
    set_instances<CommandBuffer>(made);
    return made;
  }();
  return cls;
}

// ---- IOGPUMetalCommandBuffer -----------------------------------------------

void encode_event(id self, SEL sel, id object, uint64_t value,
                  Command::Kind kind) {
  auto* buffer = not_encoding(self, sel);
  SharedEvent* event = bare_event(object);
  buffer->use(event, 0);
  buffer->commands.push_back({kind, 0, event, value, nullptr, nullptr});
  bool signal = kind == Command::kSignal;
  count(signal ? totals().signals_encoded : totals().waits_encoded);
}

void buffer_encode_signal(id self, SEL sel, id event, uint64_t value) {
  encode_event(self, sel, event, value, Command::kSignal);
}

void buffer_encode_wait(id self, SEL sel, id event, uint64_t value) {
  encode_event(self, sel, event, value, Command::kWait);
}

id buffer_compute_encoder(id self, SEL sel) {
  auto* buffer = not_encoding(self, sel);
  auto* encoder =
      make_object<ComputeEncoder>(encoder_class(buffer->queue->family));
  encoder->buffer = static_cast<CommandBuffer*>(objc_retain(buffer));
  buffer->encoding = true;
  return autorelease(encoder);
}

id buffer_compute_encoder_of_type(id self, SEL sel, uint64_t) {
  return buffer_compute_encoder(self, sel);
}

Class iogpu_command_buffer_class();

void iogpu_wait_completed(id self, SEL sel) {
  send_super(iogpu_command_buffer_class(), self, sel);
}

Class iogpu_command_buffer_class() {
  static Class cls = define_class(
      "IOGPUMetalCommandBuffer", metal_command_buffer_class(),
      {{"encodeSignalEvent:value:", "v32@0:8@16Q24",
        imp(&buffer_encode_signal)},
       {"encodeWaitForEvent:value:", "v32@0:8@16Q24", imp(&buffer_encode_wait)},
       {"waitUntilCompleted", "v16@0:8", imp(&iogpu_wait_completed)},
       {"computeCommandEncoder", "@16@0:8", imp(&buffer_compute_encoder)},
       {"computeCommandEncoderWithDispatchType:", "@24@0:8Q16",
        imp(&buffer_compute_encoder_of_type)}});
  return cls;
}

// ---- the family classes ----------------------------------------------------

// Overrides that call super: a hook that counts on both levels counts twice.
void g16_commit(id self, SEL sel) {
  send_super(command_buffer_class(0), self, sel);
}

void g16_encode_signal(id self, SEL sel, id event, uint64_t value) {
  send_super(command_buffer_class(0), self, sel, event, value);
}

// The other family's commit is its own: a hook on the base class misses it.
void g17_commit(id self, SEL sel) { buffer_commit(self, sel); }

void g17_add_completed(id self, SEL sel, const void* block) {
  send_super(command_buffer_class(1), self, sel, block);
}

}  // namespace

CommandBuffer::~CommandBuffer() {
  for (void* block : completed_handlers) {
    if (block == nullptr) continue;
    _Block_release(block);
    count(totals().handlers_dropped);
  }
  for (void* block : scheduled_handlers) _Block_release(block);
  if (retains) {
    for (Object* resource : resources) objc_release(resource);
  }
  objc_release(error);
  objc_release(queue);
}

void CommandBuffer::use(Object* resource, uint64_t bytes) {
  referenced_bytes += bytes;
  // Without retained references the encoder must keep them alive, as MLX
  // does by capturing them in completion handlers.
  if (retains) {
    objc_retain(resource);
    resources.push_back(resource);
  }
}

Class command_buffer_class(int family) {
  static Class classes[kFamilies] = {
      define_class("AGXG16XFamilyCommandBuffer", iogpu_command_buffer_class(),
                   {{"commit", "v16@0:8", imp(&g16_commit)},
                    {"encodeSignalEvent:value:", "v32@0:8@16Q24",
                     imp(&g16_encode_signal)}}),
      define_class(
          "AGXG17XFamilyCommandBuffer", iogpu_command_buffer_class(),
          {{"commit", "v16@0:8", imp(&g17_commit)},
           {"addCompletedHandler:", "v24@0:8@?16", imp(&g17_add_completed)}})};
  return classes[family];
}

CommandBuffer* make_command_buffer(CommandQueue* queue, bool retains,
                                   uint64_t error_options) {
  auto* buffer =
      make_object<CommandBuffer>(command_buffer_class(queue->family));
  buffer->queue = static_cast<CommandQueue*>(objc_retain(queue));
  buffer->retains = retains;
  buffer->error_options = error_options;
  count(totals().buffers_created);
  return buffer;
}

}  // namespace metalsim
