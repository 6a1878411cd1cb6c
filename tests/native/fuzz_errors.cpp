// Random texts through the decoding of error messages, and random values
// through the writer of reports: nothing may read or write out of bounds (run
// it under the sanitizers) and what was put in must come out.
//   fuzz_errors SEED ROUNDS
#include <fcntl.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <string>

#include "crash/async_io.h"
#include "crash/fault_log.h"

namespace {

#define CHECK(condition)                                                   \
  do {                                                                     \
    if (!(condition)) {                                                    \
      std::fprintf(stderr, "line %d: not so: %s\n", __LINE__, #condition); \
      std::exit(1);                                                        \
    }                                                                      \
  } while (false)

std::string random_text(std::mt19937& random) {
  static const char kBits[] = "(0123456789abcdefABCDEF:)kIO \\\"\n\x01\xc3\xbc";
  std::string text;
  for (auto n = random() % 400; n > 0; --n)
    text += kBits[random() % (sizeof kBits - 1)];
  return text;
}

void decode(std::mt19937& random) {
  std::string text = random_text(random);
  std::int32_t code = mlx_safe::code_in_message(text.c_str());
  CHECK(code >= -1);
  // A code that is there is found, whatever stands around it.
  auto wanted = static_cast<std::uint32_t>(random());
  char number[12];
  std::snprintf(number, sizeof number, "(%08x:", wanted);
  std::string clean;
  for (char c : text)
    if (c != '(') clean += c;
  clean += number;
  clean += text;
  // No code of Metal's is as large as that: it is passed over.
  CHECK(mlx_safe::code_in_message(clean.c_str()) ==
        (wanted <= INT32_MAX ? static_cast<std::int32_t>(wanted) : code));
}

void copy(std::mt19937& random) {
  std::string text = random_text(random);
  char to[64];
  std::memset(to, 'x', sizeof to);
  std::size_t capacity = random() % 33;
  mlx_safe::copy_text(to, capacity, text.c_str());
  if (capacity == 0) return;
  std::size_t length = std::strlen(to);
  CHECK(length < capacity);
  CHECK(text.compare(0, length, to) == 0);
  CHECK(to[capacity] == 'x');
}

void log_round_trip(std::mt19937& random) {
  mlx_safe::FaultRecord in{}, out{};
  in.code = static_cast<std::int32_t>(random());
  std::string text = random_text(random);
  mlx_safe::copy_text(in.message, sizeof in.message, text.c_str());
  auto number = mlx_safe::fault_log().record(in);
  CHECK(mlx_safe::fault_log().read(number, &out) == mlx_safe::ReadResult::kOk);
  CHECK(out.code == in.code);
  CHECK(std::strcmp(out.message, in.message) == 0);
}

void report(std::mt19937& random, int fd) {
  std::string text = random_text(random);
  CHECK(::ftruncate(fd, 0) == 0 && ::lseek(fd, 0, SEEK_SET) == 0);
  auto value = static_cast<std::int64_t>(
      (static_cast<std::uint64_t>(random()) << 32) | random());
  mlx_safe::JsonWriter json(fd);
  json.begin_object();
  json.member("text", text.c_str());
  json.member("number", value);
  json.end_object();
  CHECK(json.flush());
  char written[8192] = {};
  ssize_t size = ::pread(fd, written, sizeof written - 1, 0);
  CHECK(size > 0);
  CHECK(std::strstr(written, std::to_string(value).c_str()) != nullptr);
  for (ssize_t i = 0; i < size; ++i) {
    auto c = static_cast<unsigned char>(written[i]);
    CHECK(c >= 0x20 || c == '\n');
  }
}

}  // namespace

int main(int argc, char** argv) {
  unsigned seed = argc > 1 ? static_cast<unsigned>(std::atoi(argv[1])) : 1;
  int rounds = argc > 2 ? std::atoi(argv[2]) : 20000;
  std::printf("seed %u, %d rounds\n", seed, rounds);
  std::mt19937 random(seed);
  char path[] = "/tmp/mlx-safe-fuzz-XXXXXX";
  int fd = ::mkstemp(path);
  CHECK(fd >= 0);
  ::unlink(path);
  for (int i = 0; i < rounds; ++i) {
    decode(random);
    copy(random);
    log_round_trip(random);
    report(random, fd);
  }
  return 0;
}
