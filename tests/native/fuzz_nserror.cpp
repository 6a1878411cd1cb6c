// Failed command buffers with errors of every shape, through the hooks. Nothing
// may crash, leak or read out of bounds (run it under the sanitizers). Each is
// one fault, and what can be read of it is in the log and in what is raised.
//   fuzz_nserror SEED ROUNDS intercept|observe
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <random>

#include "crash/fault_log.h"
#include "drive.h"
#include "metal/error.h"

namespace {

using mlx_safe::FaultRecord;

constexpr std::uint32_t kShapes[] = {
    0,
    METALSIM_ERROR_NIL,
    METALSIM_ERROR_NO_DESCRIPTION,
    METALSIM_ERROR_NO_USER_INFO,
    METALSIM_ERROR_USER_INFO_STRING,
    METALSIM_ERROR_NO_UNDERLYING,
    METALSIM_ERROR_UNDERLYING_STRING,
};
// Any of these, and the number in the underlying error is out of reach.
constexpr std::uint32_t kNoNumber =
    METALSIM_ERROR_NIL | METALSIM_ERROR_NO_USER_INFO |
    METALSIM_ERROR_USER_INFO_STRING | METALSIM_ERROR_NO_UNDERLYING |
    METALSIM_ERROR_UNDERLYING_STRING;
constexpr std::uint32_t kNoText =
    METALSIM_ERROR_NIL | METALSIM_ERROR_NO_DESCRIPTION;

template <class T, std::size_t N>
T one_of(const T (&values)[N], std::mt19937& random) {
  return values[random() % N];
}

std::string random_text(std::mt19937& random) {
  static const char kBits[] = "(0123456789abcdefABCDEF:)kIO \\\"\n\x01\xc3\xbc";
  std::string text;
  for (auto n = random() % 500; n > 0; --n)
    text += kBits[random() % (sizeof kBits - 1)];
  if (random() % 2) text += "(0000000b:kIOGPU";
  return text;
}

// Code 4 is left out of the plan's own: the device would be banned.
metalsim_plan random_plan(std::mt19937& random, const std::string& text) {
  constexpr std::int32_t kCodes[] = {2,         3,  8,  0xe,      0x11,
                                     INT32_MAX, -1, -5, INT32_MIN};
  constexpr std::int64_t kNumbers[] = {0,
                                       1,
                                       4,
                                       8,
                                       INT32_MAX,
                                       std::int64_t{INT32_MAX} + 1,
                                       std::int64_t{1} << 32 | 8,
                                       INT64_MAX,
                                       -1,
                                       -8,
                                       INT32_MIN,
                                       INT64_MIN};
  metalsim_plan plan{};
  plan.nth = 1;
  plan.code = one_of(kCodes, random);
  plan.error_shape = one_of(kShapes, random) | one_of(kShapes, random);
  plan.error_number = one_of(kNumbers, random);
  if (random() % 2) plan.error_text = text.c_str();
  return plan;
}

// The number in the text that Metal has for a code, or in `error_text`.
std::int32_t number_in_text(const metalsim_plan& plan) {
  if (plan.error_shape & kNoText) return -1;
  if (plan.error_text != nullptr)
    return mlx_safe::code_in_message(plan.error_text);
  return plan.code > 0 ? plan.code : -1;
}

std::int32_t expected_code(const metalsim_plan& plan) {
  std::int64_t number = plan.error_number ? plan.error_number : plan.code;
  bool readable = !(plan.error_shape & kNoNumber);
  return readable && number > 0 && number <= INT32_MAX
             ? static_cast<std::int32_t>(number)
             : number_in_text(plan);
}

void check_message(const FaultRecord& fault, const metalsim_plan& plan) {
  const std::string prefix = mlx_safe::metal::kMessagePrefix;
  std::string message = fault.message;
  CHECK(message.compare(0, prefix.size(), prefix) == 0);
  std::string said = message.substr(prefix.size());
  if (plan.error_shape & kNoText) {
    CHECK(said == "unknown error");
  } else if (plan.error_text != nullptr) {
    // Whole, or as much as there is room for, less the rest of a character.
    std::string text = plan.error_text;
    std::size_t room = sizeof fault.message - 1 - prefix.size();
    CHECK(text.compare(0, said.size(), said) == 0);
    CHECK(said.size() == text.size() ||
          (text.size() > room && said.size() + 4 > room));
  } else {
    CHECK(said.find("(") != std::string::npos);
  }
}

void round(std::mt19937& random, drive::Regime regime) {
  std::string text = random_text(random);
  metalsim_plan plan = random_plan(random, text);
  METALSIM(metalsim_plan_clear)();
  METALSIM(metalsim_plan_add)(&plan);
  std::uint64_t before = mlx_safe::fault_log().epoch();
  std::string told = drive::try_buffer(regime);
  CHECK(mlx_safe::fault_log().epoch() == before + 1);
  FaultRecord fault{};
  CHECK(mlx_safe::fault_log().read(before + 1, &fault) ==
        mlx_safe::ReadResult::kOk);
  CHECK(fault.code == expected_code(plan));
  check_message(fault, plan);
  CHECK(!told.empty());
  if (regime == drive::Regime::kIntercept) CHECK(told == fault.message);
  CHECK(drive::try_buffer(regime).empty());
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 4) {
    std::fprintf(stderr, "usage: fuzz_nserror SEED ROUNDS intercept|observe\n");
    return 2;
  }
  alarm(300);
  std::mt19937 random(static_cast<unsigned>(std::atoi(argv[1])));
  bool intercept = std::strcmp(argv[3], "intercept") == 0;
  drive::device();
  mlx_safe::metal::this_thread_may_throw(true);
  auto mode = intercept ? mlx_safe::metal::Mode::kIntercept
                        : mlx_safe::metal::Mode::kObserve;
  CHECK(mlx_safe::metal::install(mode).verified);
  for (int i = std::atoi(argv[2]); i > 0; --i)
    round(random,
          intercept ? drive::Regime::kIntercept : drive::Regime::kObserve);
  CHECK(METALSIM(metalsim_wait_idle)(drive::kLongMs) == 1);
  mlx_safe::metal::uninstall();
  auto left = mlx_safe::metal::counters();
  CHECK(left.buffer_records == 0 && left.event_records == 0);
  CHECK(METALSIM(metalsim_live_objects)("NSError") == 0);
  // Not through static destructors: the device's threads go on.
  std::fflush(nullptr);
  _exit(0);
}
