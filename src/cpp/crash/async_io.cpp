#include "crash/async_io.h"

#include <unistd.h>

#include <cerrno>
#include <cstring>

namespace mlx_safe {

bool write_all(int fd, const char* data, std::size_t size,
               MakeRoom make_room) noexcept {
  while (size > 0) {
    ssize_t n = ::write(fd, data, size);
    if (n < 0) {
      if (errno == EINTR) continue;
      bool full = errno == ENOSPC || errno == EDQUOT;
      if (full && make_room != nullptr && make_room()) continue;
      return false;
    }
    data += n;
    size -= static_cast<std::size_t>(n);
  }
  return true;
}

void copy_text(char* to, std::size_t capacity, const char* from) noexcept {
  if (capacity == 0) return;
  std::size_t n = 0;
  if (from != nullptr) {
    n = ::strnlen(from, capacity - 1);
    if (from[n] != '\0') {
      // A continuation byte at the cut means that a character was begun.
      while (n > 0 && (static_cast<unsigned char>(from[n]) & 0xC0) == 0x80) --n;
    }
    std::memcpy(to, from, n);
  }
  to[n] = '\0';
}

bool append_text(char* to, std::size_t capacity, std::size_t* used,
                 const char* text) noexcept {
  std::size_t size = std::strlen(text);
  if (*used + size + 1 > capacity) return false;
  std::memcpy(to + *used, text, size + 1);
  *used += size;
  return true;
}

bool append_number(char* to, std::size_t capacity, std::size_t* used,
                   std::uint64_t number) noexcept {
  char digits[21];
  std::size_t n = sizeof digits - 1;
  digits[n] = '\0';
  do {
    digits[--n] = static_cast<char>('0' + number % 10);
  } while ((number /= 10) != 0);
  return append_text(to, capacity, used, digits + n);
}

namespace {

// Length of the UTF-8 character at `at`, of which `left` bytes may be read; 0
// when it is none (the table of well-formed sequences of Unicode's chapter 3).
std::size_t utf8_length(const unsigned char* at, std::size_t left) noexcept {
  unsigned char c = at[0];
  std::size_t size = c < 0x80                ? 1
                     : c >= 0xC2 && c < 0xE0 ? 2
                     : c >= 0xE0 && c < 0xF0 ? 3
                     : c >= 0xF0 && c < 0xF5 ? 4
                                             : 0;
  if (size > left) return 0;
  for (std::size_t i = 1; i < size; ++i)
    if ((at[i] & 0xC0) != 0x80) return 0;
  if (c == 0xE0 && at[1] < 0xA0) return 0;   // overlong
  if (c == 0xED && at[1] >= 0xA0) return 0;  // surrogates
  if (c == 0xF0 && at[1] < 0x90) return 0;   // overlong
  if (c == 0xF4 && at[1] >= 0x90) return 0;  // beyond U+10FFFF
  return size;
}

// Stands for itself in a JSON string.
bool is_plain(char c) noexcept {
  return c >= 0x20 && c < 0x7F && c != '"' && c != '\\';
}

}  // namespace

void JsonWriter::byte(char c) noexcept {
  if (used_ == capacity_) {
    if (fd_ < 0) {
      good_ = false;
      return;
    }
    flush();
  }
  into_[used_++] = c;
}

void JsonWriter::bytes(const char* at, std::size_t size) noexcept {
  for (std::size_t room; size > (room = capacity_ - used_);) {
    std::memcpy(into_ + used_, at, room);
    used_ += room;
    byte(at[room]);  // makes room, or there is none
    at += room + 1;
    size -= room + 1;
  }
  std::memcpy(into_ + used_, at, size);
  used_ += size;
}

void JsonWriter::raw(const char* s) noexcept { bytes(s, std::strlen(s)); }

void JsonWriter::begin_object() noexcept {
  byte('{');
  ++depth_;
  comma_ = false;
}

void JsonWriter::end_object() noexcept {
  byte('}');
  --depth_;
  comma_ = true;
}

void JsonWriter::begin_array() noexcept {
  byte('[');
  ++depth_;
  comma_ = false;
}

void JsonWriter::end_array() noexcept {
  byte(']');
  --depth_;
  comma_ = true;
}

void JsonWriter::item() noexcept {
  if (comma_) raw(depth_ == 2 ? ",\n  " : ", ");
  comma_ = true;
}

void JsonWriter::key(const char* name) noexcept {
  if (comma_) raw(depth_ == 1 ? "," : ", ");
  if (depth_ == 1) byte('\n');
  text(name);
  raw(": ");
  comma_ = true;
}

void JsonWriter::escaped(unsigned char c) noexcept {
  static const char kHex[] = "0123456789abcdef";
  raw("\\u00");
  byte(kHex[c >> 4]);
  byte(kHex[c & 15]);
}

std::size_t JsonWriter::character(const char* at, std::size_t left) noexcept {
  auto c = static_cast<unsigned char>(*at);
  if (c == '"' || c == '\\') {
    byte('\\');
    byte(*at);
    return 1;
  }
  if (c == '\n') {
    raw("\\n");
    return 1;
  }
  if (c < 0x20 || c == 0x7F) {
    escaped(c);
    return 1;
  }
  std::size_t size =
      utf8_length(reinterpret_cast<const unsigned char*>(at), left);
  if (size == 0) {
    raw("\\ufffd");
    return 1;
  }
  for (std::size_t i = 0; i < size; ++i) byte(at[i]);
  return size;
}

void JsonWriter::text(const char* value) noexcept {
  if (value == nullptr) return raw("null");
  byte('"');
  for (std::size_t left = std::strlen(value); left > 0;) {
    std::size_t size = 0;
    while (size < left && is_plain(value[size])) ++size;
    if (size > 0) {
      bytes(value, size);
    } else {
      size = character(value, left);
    }
    value += size;
    left -= size;
  }
  byte('"');
}

void JsonWriter::text_from(int from) noexcept {
  char bytes[512];
  std::size_t kept = 0;  // the beginning of a character, cut by the read
  byte('"');
  while (true) {
    ssize_t n = ::read(from, bytes + kept, sizeof bytes - kept);
    if (n < 0 && errno == EINTR) continue;
    std::size_t have = kept + (n > 0 ? static_cast<std::size_t>(n) : 0);
    std::size_t at = 0;
    // Four bytes hold any character; the last ones wait for the next read.
    while (at < have && (n <= 0 || have - at >= 4))
      at += character(bytes + at, have - at);
    kept = have - at;
    std::memmove(bytes, bytes + at, kept);
    if (n <= 0) break;
  }
  byte('"');
}

void JsonWriter::integer(std::int64_t value) noexcept {
  auto rest = static_cast<std::uint64_t>(value);
  if (value < 0) {
    byte('-');
    rest = 0 - rest;
  }
  char digits[20];  // the last one first
  std::size_t n = 0;
  do {
    digits[n++] = static_cast<char>('0' + rest % 10);
  } while ((rest /= 10) != 0);
  while (n > 0) byte(digits[--n]);
}

void JsonWriter::address(std::uint64_t value) noexcept {
  static const char kHex[] = "0123456789abcdef";
  raw("\"0x");
  int shift = 60;
  while (shift > 0 && (value >> shift) == 0) shift -= 4;
  for (; shift >= 0; shift -= 4) byte(kHex[(value >> shift) & 15]);
  byte('"');
}

void JsonWriter::real(double value) noexcept {
  if (!(value > -9e12 && value < 9e12)) return raw("null");
  if (value < 0) byte('-');
  auto micros =
      static_cast<std::int64_t>((value < 0 ? -value : value) * 1e6 + 0.5);
  integer(micros / 1'000'000);
  byte('.');
  for (std::int64_t unit = 100'000; unit > 0; unit /= 10)
    byte(static_cast<char>('0' + micros / unit % 10));
}

void JsonWriter::json(const char* value) noexcept {
  raw(value == nullptr || *value == '\0' ? "null" : value);
}

void JsonWriter::member(const char* name, const char* value) noexcept {
  key(name);
  text(value);
}

void JsonWriter::member(const char* name, std::int64_t value) noexcept {
  key(name);
  integer(value);
}

bool JsonWriter::flush() noexcept {
  if (fd_ < 0) return good_;
  if (used_ > 0 && good_ && !write_all(fd_, into_, used_, make_room_))
    good_ = false;
  used_ = 0;
  return good_;
}

void JsonWriter::back_to(std::size_t used) noexcept {
  used_ = used;
  good_ = true;
}

}  // namespace mlx_safe
