// Writing to a file descriptor from the crash path.
//
// Everything declared here is async-signal-safe: no allocation, no locks, no
// stdio. It is the only output vocabulary of the crash path.
#pragma once

#include <cstddef>
#include <cstdint>

namespace mlx_safe {

// What to do when the disk is full: true if there is room now.
using MakeRoom = bool (*)();

// Writes all of `size` bytes, going on after EINTR and short writes.
// Returns false when the descriptor takes no more (disk full, closed pipe).
bool write_all(int fd, const char* data, std::size_t size,
               MakeRoom make_room = nullptr) noexcept;

// Copies at most `capacity` - 1 bytes of `from` (null: the empty string) and
// always terminates `to`. Never cuts a UTF-8 character in two.
void copy_text(char* to, std::size_t capacity, const char* from) noexcept;

// Appends digits, a string; never beyond `capacity` - 1 bytes, and always
// terminated. `used` is moved on. False when it did not fit.
bool append_text(char* to, std::size_t capacity, std::size_t* used,
                 const char* text) noexcept;
bool append_number(char* to, std::size_t capacity, std::size_t* used,
                   std::uint64_t number) noexcept;

// A JSON document written piece by piece: to a descriptor through a small
// buffer, or into memory. The caller writes members in order; `flush` after
// each section so that a crash while writing leaves the sections before it on
// disk. Members of the outermost object go on lines of their own.
class JsonWriter {
 public:
  explicit JsonWriter(int fd, MakeRoom make_room = nullptr) noexcept
      : fd_(fd), make_room_(make_room) {}
  // Into memory; once it is full `flush` returns false. Not terminated.
  JsonWriter(char* into, std::size_t capacity) noexcept
      : fd_(-1), into_(into), capacity_(capacity) {}
  JsonWriter(const JsonWriter&) = delete;
  JsonWriter& operator=(const JsonWriter&) = delete;

  void raw(const char* text) noexcept;
  void begin_object() noexcept;
  void end_object() noexcept;
  void begin_array() noexcept;
  void end_array() noexcept;
  // Before each element of an array.
  void item() noexcept;
  void key(const char* name) noexcept;
  // Null is written as JSON null, what is not UTF-8 as U+FFFD.
  void text(const char* value) noexcept;
  void integer(std::int64_t value) noexcept;
  // "0x…", a string: JSON's numbers do not hold 64 bits everywhere.
  void address(std::uint64_t value) noexcept;
  // Six decimals; null when it is no number or does not fit.
  void real(double value) noexcept;
  void boolean(bool value) noexcept { raw(value ? "true" : "false"); }
  // A value that is JSON already; empty or null: null.
  void json(const char* value) noexcept;
  // A JSON string whose text comes from `from` until its end.
  void text_from(int from) noexcept;

  void member(const char* name, const char* value) noexcept;
  void member(const char* name, std::int64_t value) noexcept;
  // False once any byte could not be written.
  bool flush() noexcept;
  // Bytes in memory so far, and back to a former number of them: for a member
  // that may not fit.
  std::size_t used() const noexcept { return used_; }
  void back_to(std::size_t used) noexcept;

 private:
  void byte(char c) noexcept;
  void bytes(const char* at, std::size_t size) noexcept;
  void escaped(unsigned char c) noexcept;
  // One character of a string; returns its length in bytes.
  std::size_t character(const char* at, std::size_t left) noexcept;

  int fd_;
  MakeRoom make_room_ = nullptr;
  char* into_ = buffer_;
  std::size_t capacity_ = sizeof buffer_;
  std::size_t used_ = 0;
  int depth_ = 0;
  bool comma_ = false;
  bool good_ = true;
  char buffer_[1024];
};

}  // namespace mlx_safe
