#include "async_io.h"

#include <unistd.h>

#include <cerrno>
#include <cstring>

namespace mlx_safe {

bool write_all(int fd, const char* data, std::size_t size) noexcept {
  while (size > 0) {
    ssize_t n = ::write(fd, data, size);
    if (n < 0) {
      if (errno == EINTR) continue;
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
    while (n + 1 < capacity && from[n] != '\0') ++n;
    if (from[n] != '\0') {
      // A continuation byte at the cut means that a character was begun.
      while (n > 0 && (static_cast<unsigned char>(from[n]) & 0xC0) == 0x80) --n;
    }
    std::memcpy(to, from, n);
  }
  to[n] = '\0';
}

void JsonWriter::byte(char c) noexcept {
  if (used_ == sizeof buffer_) flush();
  buffer_[used_++] = c;
}

void JsonWriter::raw(const char* s) noexcept {
  while (*s != '\0') byte(*s++);
}

void JsonWriter::begin_object() noexcept {
  byte('{');
  comma_ = false;
}

void JsonWriter::end_object() noexcept {
  byte('}');
  comma_ = true;
}

void JsonWriter::key(const char* name) noexcept {
  if (comma_) byte(',');
  raw("\n\"");
  raw(name);
  raw("\": ");
  comma_ = true;
}

void JsonWriter::escaped(unsigned char c) noexcept {
  static const char kHex[] = "0123456789abcdef";
  raw("\\u00");
  byte(kHex[c >> 4]);
  byte(kHex[c & 15]);
}

void JsonWriter::text(const char* value) noexcept {
  if (value == nullptr) return raw("null");
  byte('"');
  for (; *value != '\0'; ++value) {
    auto c = static_cast<unsigned char>(*value);
    if (c == '"' || c == '\\') {
      byte('\\');
      byte(*value);
    } else if (c < 0x20) {
      escaped(c);
    } else {
      byte(*value);
    }
  }
  byte('"');
}

void JsonWriter::integer(std::int64_t value) noexcept {
  char digits[20];
  std::size_t n = 0;
  auto rest = static_cast<std::uint64_t>(value);
  if (value < 0) {
    byte('-');
    rest = 0 - rest;
  }
  do {
    digits[n++] = static_cast<char>('0' + rest % 10);
    rest /= 10;
  } while (rest != 0);
  while (n > 0) byte(digits[--n]);
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
  if (used_ > 0 && !write_all(fd_, buffer_, used_)) good_ = false;
  used_ = 0;
  return good_;
}

}  // namespace mlx_safe
