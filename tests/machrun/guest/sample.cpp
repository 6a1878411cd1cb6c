// A small library for macOS with something of everything that the loader reads.
// Pointers to itself, to libc++ and to libSystem, a weak definition, variables
// of a thread, a constructor, exceptions. `check` is 0 where all of it is as it
// must be.
#include <pthread.h>
#include <unistd.h>

#include <cstdio>
#include <cstring>
#include <stdexcept>
#include <string>

namespace {

thread_local int t_number = 7;
thread_local long t_zeroes[64];
const char* const kNames[] = {"one", "two", "three"};
int (*const kCalls[])(const char*, ...) = {std::printf};
std::string g_text;

struct AtStart {
  AtStart() { g_text = std::string(kNames[0]) + kNames[2]; }
} g_at_start;

__attribute__((noinline)) int thrown(int number) {
  if (number > 0) throw std::runtime_error(g_text);
  return number;
}

struct Own : std::exception {};

void* in_thread(void*) {
  t_number += static_cast<int>(++t_zeroes[63]);
  return t_number == 8 ? nullptr : &g_text;
}

}  // namespace

// One for all images that have it.
template <class T>
struct Shared {
  static T value;
};
template <class T>
T Shared<T>::value = 3;

extern "C" __attribute__((visibility("default"))) int check(int, char**) {
  pthread_t thread;
  void* result = nullptr;
  if (pthread_create(&thread, nullptr, in_thread, nullptr)) return 1;
  if (pthread_join(thread, &result) || result != nullptr) return 2;
  if (t_number != 7 || t_zeroes[63] != 0 || kCalls[0] != &std::printf) return 3;
  if (lseek(-1, 0, SEEK_SET) != -1) return 5;
  Shared<int>::value += 1;
  try {
    throw Own();
  } catch (const std::exception&) {
    Shared<int>::value += 1;
  }
  try {
    return 10 + thrown(t_number);
  } catch (const std::exception& e) {
    return std::strcmp(e.what(), "onethree") == 0 && Shared<int>::value == 5
               ? 0
               : 4;
  }
}
