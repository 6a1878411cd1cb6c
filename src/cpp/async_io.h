// Writing to a file descriptor from the crash path.
//
// Everything declared here is async-signal-safe: no allocation, no locks, no
// stdio. It is the only output vocabulary the terminate handler may use.
#pragma once

#include <cstddef>
#include <cstdint>

namespace mlx_safe {

// Writes all of `size` bytes, going on after EINTR and short writes.
// Returns false when the descriptor takes no more (disk full, closed pipe).
bool write_all(int fd, const char* data, std::size_t size) noexcept;

// Copies at most `capacity` - 1 bytes of `from` (null: the empty string) and
// always terminates `to`. Never cuts a UTF-8 character in two.
void copy_text(char* to, std::size_t capacity, const char* from) noexcept;

// A JSON document written piece by piece through a small buffer on the stack.
// The caller writes members in order; `flush` after each section so that a
// crash inside the handler leaves the sections before it on disk.
class JsonWriter {
 public:
  explicit JsonWriter(int fd) noexcept : fd_(fd) {}
  JsonWriter(const JsonWriter&) = delete;
  JsonWriter& operator=(const JsonWriter&) = delete;

  void raw(const char* text) noexcept;
  void begin_object() noexcept;
  void end_object() noexcept;
  void key(const char* name) noexcept;
  void text(const char* value) noexcept;  // null is written as JSON null
  void integer(std::int64_t value) noexcept;
  void member(const char* name, const char* value) noexcept;
  void member(const char* name, std::int64_t value) noexcept;
  // False once any byte could not be written.
  bool flush() noexcept;

 private:
  void byte(char c) noexcept;
  void escaped(unsigned char c) noexcept;

  int fd_;
  std::size_t used_ = 0;
  bool comma_ = false;
  bool good_ = true;
  char buffer_[256];
};

}  // namespace mlx_safe
