// MTLCommandQueue: makes command buffers and runs them in commit order.

#include "metal.h"

namespace metalsim {
namespace {

id hand_out(CommandQueue* queue, bool retains, uint64_t error_options) {
  id buffer = make_command_buffer(queue, retains, error_options);
  if (!(settings().debug_layers & METALSIM_DEBUG_BUFFERS)) {
    return autorelease(buffer);
  }
  id wrapper = wrap_command_buffer(buffer);
  objc_release(buffer);
  return autorelease(wrapper);
}

id queue_buffer(id self, SEL) {
  return hand_out(static_cast<CommandQueue*>(self), true, 0);
}

id queue_buffer_unretained(id self, SEL) {
  return hand_out(static_cast<CommandQueue*>(self), false, 0);
}

id queue_buffer_described(id self, SEL, id description) {
  auto* wanted = static_cast<BufferDescriptor*>(description);
  return hand_out(static_cast<CommandQueue*>(self),
                  wanted ? wanted->retains : true,
                  wanted ? wanted->error_options : 0);
}

id queue_device(id self, SEL) {
  return static_cast<CommandQueue*>(self)->device;
}

Class metal_queue_class() {
  static Class cls = [] {
    Class base = define_class("_MTLCommandQueue", labelled_class(),
                              {{"device", "@16@0:8", imp(&queue_device)}});
    Class made = define_class("IOGPUMetalCommandQueue", base,
                              {{"commandBuffer", "@16@0:8", imp(&queue_buffer)},
                               {"commandBufferWithUnretainedReferences",
                                "@16@0:8", imp(&queue_buffer_unretained)},
                               {"commandBufferWithDescriptor:", "@24@0:8@16",
                                imp(&queue_buffer_described)}});
    set_instances<CommandQueue>(made);
    return made;
  }();
  return cls;
}

// ---- MTLCommandBufferDescriptor --------------------------------------------

BufferDescriptor* as_descriptor(id self) {
  return static_cast<BufferDescriptor*>(self);
}

uint64_t descriptor_error_options(id self, SEL) {
  return as_descriptor(self)->error_options;
}
void descriptor_set_error_options(id self, SEL, uint64_t options) {
  as_descriptor(self)->error_options = options;
}
BOOL descriptor_retains(id self, SEL) { return as_descriptor(self)->retains; }
void descriptor_set_retains(id self, SEL, BOOL retains) {
  as_descriptor(self)->retains = retains;
}

// ---- the GPU's side --------------------------------------------------------

void run_queue(CommandQueue* queue) {
  for (;;) {
    CommandBuffer* buffer;
    {
      std::unique_lock guard(queue->lock);
      // A buffer that was enqueued but is not yet committed holds its place.
      queue->changed.wait(guard, [queue] {
        return queue->stop || (!queue->waiting.empty() &&
                               queue->waiting.front()->status >= kCommitted);
      });
      if (queue->stop) return;
      buffer = queue->waiting.front();
      queue->waiting.pop_front();
    }
    execute(buffer);
    // From here the completion thread may let go of the buffer, and with it
    // of the queue, whose destructor waits for this thread.
    complete_later(buffer);
  }
}

void start_gpu(CommandQueue* queue) {  // with the queue's lock held
  if (queue->started) return;
  queue->started = true;
  queue->gpu = std::thread(run_queue, queue);
}

}  // namespace

// Every committed buffer keeps its queue, so nothing is in flight here.
CommandQueue::~CommandQueue() {
  {
    std::lock_guard guard(lock);
    stop = true;
  }
  changed.notify_all();
  if (gpu.joinable()) gpu.join();
  objc_release(device);
}

Class queue_class(int family) {
  static Class classes[kFamilies] = {
      define_class("AGXG16XFamilyCommandQueue", metal_queue_class(), {}),
      define_class("AGXG17XFamilyCommandQueue", metal_queue_class(), {})};
  return classes[family];
}

Class descriptor_class() {
  static Class cls = [] {
    Class made = define_class(
        "MTLCommandBufferDescriptor", nsobject_class(),
        {{"errorOptions", "Q16@0:8", imp(&descriptor_error_options)},
         {"setErrorOptions:", "v24@0:8Q16", imp(&descriptor_set_error_options)},
         {"retainedReferences", "B16@0:8", imp(&descriptor_retains)},
         {"setRetainedReferences:", "v20@0:8B16",
          imp(&descriptor_set_retains)}});
    set_instances<BufferDescriptor>(made);
    register_class(made);
    return made;
  }();
  return cls;
}

[[maybe_unused]] static const Class descriptor_ready = descriptor_class();

void reserve_turn(CommandBuffer* buffer) {
  CommandQueue* queue = buffer->queue;
  objc_retain(buffer);
  std::lock_guard guard(queue->lock);
  buffer->status.store(kEnqueued);
  queue->waiting.push_back(buffer);
}

// Takes the numbers that say when the buffer was committed, and with them
// its fate. For a queue's GPU thread this happens under the queue's lock, so
// that numbers and positions agree.
static void take_turn(CommandBuffer* buffer) {
  Totals& all = totals();
  metalsim_record& record = buffer->record;
  record.serial = all.buffers_committed.fetch_add(1) + 1;
  record.queue_turn = buffer->queue->turns.fetch_add(1) + 1;
  record.buffer = buffer;
  record.queue = buffer->queue;
  buffer->fate = decide_fate(buffer->queue, record.serial);
  one_more_in_flight();
}

static void submit_inline(CommandBuffer* buffer) {
  objc_retain(buffer);
  take_turn(buffer);
  buffer->status.store(kCommitted);
  execute(buffer);
  complete_now(buffer);
}

void submit(CommandBuffer* buffer) {
  if (settings().run_inline) return submit_inline(buffer);
  CommandQueue* queue = buffer->queue;
  bool reserved = buffer->status.load() == kEnqueued;
  if (!reserved) objc_retain(buffer);
  {
    std::lock_guard guard(queue->lock);
    take_turn(buffer);
    buffer->status.store(kCommitted);
    if (!reserved) queue->waiting.push_back(buffer);
    start_gpu(queue);
    // Under the lock: once it is released the buffer may run, and the queue
    // with it may go.
    queue->changed.notify_all();
  }
}

}  // namespace metalsim
