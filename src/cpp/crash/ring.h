// A fixed ring of plain records, and a single such record, in static storage.
//
// Writers take no lock, allocate nothing and never wait; a reader never sees
// half a record. Everything here is async-signal-safe, for any thread.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>

namespace mlx_safe {

enum class ReadResult { kOk, kPending, kLost };

// A record as atomic words: to read it while it is written is no data race,
// only worthless, which the stamps of `Ring` and `Latest` tell.
template <class Record>
class SharedWords {
  static_assert(std::is_trivially_copyable_v<Record>);
  static_assert(sizeof(Record) % sizeof(std::uint64_t) == 0);
  static constexpr std::size_t kWords = sizeof(Record) / sizeof(std::uint64_t);

 public:
  void store(const Record& record) noexcept {
    std::uint64_t words[kWords];
    std::memcpy(words, &record, sizeof record);
    // Release: whoever sees one of them sees the stamp that says "busy".
    for (std::size_t i = 0; i < kWords; ++i)
      words_[i].store(words[i], std::memory_order_release);
  }

  void load(Record* record) const noexcept {
    std::uint64_t words[kWords];
    // Acquire on each word: a second look at the stamp must not move above.
    for (std::size_t i = 0; i < kWords; ++i)
      words[i] = words_[i].load(std::memory_order_acquire);
    std::memcpy(record, words, sizeof *record);
  }

 private:
  std::atomic<std::uint64_t> words_[kWords]{};
};

// The last `kCapacity` records, numbered from 1 in the order in which their
// places were claimed.
template <class Record, std::size_t kCapacity>
class Ring {
 public:
  // The number of a new record, to be stored at once. Between the two it reads
  // as pending.
  std::uint64_t claim() noexcept { return claimed_.fetch_add(1) + 1; }
  std::uint64_t claimed() const noexcept { return claimed_.load(); }

  void store(std::uint64_t number, const Record& record) noexcept {
    Slot& slot = slots_[number % kCapacity];
    std::uint64_t seen = slot.stamp.load();
    if (seen == kBusy || seen > number ||
        !slot.stamp.compare_exchange_strong(seen, kBusy)) {
      // A writer that claimed this place a whole ring ago is still in it, or
      // this one was held up for so long that a newer record is there.
      dropped_.fetch_add(1);
      return;
    }
    slot.record.store(record);
    slot.stamp.store(number, std::memory_order_release);
  }

  // kPending: claimed, its writer is still writing. kLost: overwritten by a
  // later one, or dropped.
  ReadResult read(std::uint64_t number, Record* out) const noexcept {
    std::uint64_t newest = claimed();
    if (number == 0 || number > newest) return ReadResult::kPending;
    if (newest - number >= kCapacity) return ReadResult::kLost;
    const Slot& slot = slots_[number % kCapacity];
    std::uint64_t before = slot.stamp.load(std::memory_order_acquire);
    if (before == kBusy || before < number) return ReadResult::kPending;
    if (before > number) return ReadResult::kLost;
    Record copy;
    slot.record.load(&copy);
    if (slot.stamp.load(std::memory_order_relaxed) != before)
      return ReadResult::kLost;
    std::memcpy(out, &copy, sizeof copy);
    return ReadResult::kOk;
  }

  // Calls `use(record)` for each that can be read, oldest first.
  template <class Use>
  void each(Use use) const noexcept {
    std::uint64_t newest = claimed();
    std::uint64_t n = newest > kCapacity ? newest - kCapacity + 1 : 1;
    for (Record record; n <= newest; ++n)
      if (read(n, &record) == ReadResult::kOk) use(record);
  }

  // Records that could not be stored.
  std::uint64_t dropped() const noexcept { return dropped_.load(); }

 private:
  static constexpr std::uint64_t kBusy = ~std::uint64_t{0};

  struct Slot {
    std::atomic<std::uint64_t> stamp{0};  // number it holds, or kBusy
    SharedWords<Record> record;
  };

  std::atomic<std::uint64_t> claimed_{0};
  std::atomic<std::uint64_t> dropped_{0};
  Slot slots_[kCapacity];
};

// One record, of which the newest counts.
template <class Record>
class Latest {
 public:
  // A writer that meets another leaves the place to it.
  void store(const Record& record) noexcept {
    std::uint64_t seen = stamp_.load();
    if (seen % 2 != 0 || !stamp_.compare_exchange_strong(seen, seen + 1))
      return;
    record_.store(record);
    stamp_.store(seen + 2, std::memory_order_release);
  }

  // False when there is none yet, or it is being written all the time.
  bool load(Record* out) const noexcept {
    for (int i = 0; i < 100; ++i) {
      std::uint64_t before = stamp_.load(std::memory_order_acquire);
      if (before == 0) return false;
      if (before % 2 != 0) continue;
      Record copy;
      record_.load(&copy);
      if (stamp_.load(std::memory_order_relaxed) != before) continue;
      std::memcpy(out, &copy, sizeof copy);
      return true;
    }
    return false;
  }

 private:
  std::atomic<std::uint64_t> stamp_{0};  // odd: being written
  SharedWords<Record> record_;
};

}  // namespace mlx_safe
