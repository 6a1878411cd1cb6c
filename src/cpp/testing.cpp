#include "testing.h"

#include <stdexcept>
#include <thread>

#include "async_io.h"
#include "fault_log.h"

namespace mlx_safe {

std::uint64_t testing_record_fault(std::int32_t code,
                                   const std::string& message) {
  std::uint64_t number = 0;
  std::thread([&] {
    FaultRecord fault{};
    fault.code = code;
    fault.source = static_cast<std::int32_t>(FaultSource::kInjected);
    copy_text(fault.label, sizeof fault.label, "mlx_safe.testing");
    copy_text(fault.message, sizeof fault.message, message.c_str());
    number = fault_log().record(fault);
  }).join();
  return number;
}

void testing_throw_on_foreign_thread(const std::string& message) {
  std::thread([message] { throw std::runtime_error(message); }).detach();
}

}  // namespace mlx_safe
