// The threads that kernels run on, and the replay of a tape of kernels.
//
// A worker spins for a moment after a job, as the next kernel follows within microseconds, then sleeps: idle costs
// nothing. The caller takes pieces, too, and a job ends when its pieces are done, not when every worker has seen it: a
// worker that the system has put aside delays nobody.
#include <atomic>
#include <chrono>
#include <cstdlib>
#include <mutex>
#include <thread>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "common.h"

namespace {

constexpr auto SPIN = std::chrono::microseconds(50);  // a guess: several kernels' worth
constexpr u32 CLOSED = 0xffffffff;

inline void relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Return true when `done` becomes true within the spin.
template <class F>
bool spin(F&& done) {
  const auto end = std::chrono::steady_clock::now() + SPIN;
  do {
    for (int i = 0; i < 16; i++) {
      if (done()) return true;
      relax();
    }
  } while (std::chrono::steady_clock::now() < end);
  return done();
}

struct Pool {
  std::mutex in_use;
  // Generation in the high half, the next piece in the low half. It is CLOSED while a job's fields are written, so that
  // taking a piece by compare-and-swap proves that the fields read before belong to the job.
  std::atomic<uint64_t> next{CLOSED};
  std::atomic<void (*)(void*, i64)> work{nullptr};
  std::atomic<void*> context{nullptr};
  std::atomic<u32> count{0}, done{0}, epoch{0};
  i64 threads = 1, started = 1;

  void take_pieces() {
    uint64_t seen = next.load(std::memory_order_acquire);
    while (true) {
      const u32 piece = (u32)seen, all = count.load(std::memory_order_relaxed);
      auto* run = work.load(std::memory_order_relaxed);
      void* with = context.load(std::memory_order_relaxed);
      if (piece >= all) return;
      if (!next.compare_exchange_weak(seen, seen + 1, std::memory_order_acq_rel, std::memory_order_acquire)) continue;
      run(with, piece);
      seen++;
      if (done.fetch_add(1, std::memory_order_acq_rel) + 1 == all) done.notify_one();
    }
  }

  void serve() {
    u32 seen = epoch.load(std::memory_order_acquire);
    while (true) {
      take_pieces();
      if (!spin([&] { return epoch.load(std::memory_order_acquire) != seen; }))
        epoch.wait(seen, std::memory_order_acquire);
      seen = epoch.load(std::memory_order_acquire);
    }
  }

  void run(i64 pieces, void (*run)(void*, i64), void* with) {
    for (; started < threads; started++) std::thread([this] { serve(); }).detach();
    const uint64_t generation = (next.load(std::memory_order_relaxed) >> 32) + 1;
    next.store(generation << 32 | CLOSED, std::memory_order_release);
    work.store(run, std::memory_order_relaxed);
    context.store(with, std::memory_order_relaxed);
    count.store((u32)pieces, std::memory_order_relaxed);
    done.store(0, std::memory_order_relaxed);
    next.store(generation << 32, std::memory_order_release);
    epoch.fetch_add(1, std::memory_order_release);
    epoch.notify_all();
    take_pieces();
    const auto finished = [&] { return done.load(std::memory_order_acquire) == (u32)pieces; };
    if (spin(finished)) return;
    for (u32 seen; (seen = done.load(std::memory_order_acquire)) != (u32)pieces;) done.wait(seen);
  }
};

Pool& pool = *new Pool;  // never destroyed: its workers sleep until the process ends

struct Scratch {
  void* memory = nullptr;
  size_t size = 0;
  ~Scratch() { free(memory); }
};
thread_local Scratch owned[2];

}  // namespace

void* scratch(size_t num_bytes, int use) {
  Scratch& own = owned[use];
  if (num_bytes > own.size) {
    free(own.memory);
    own.size = (num_bytes + 4095) / 4096 * 4096;
    own.memory = aligned_alloc(64, own.size);
    if (!own.memory) abort();
  }
  return own.memory;
}

bool tiles_allowed() {
#if defined(__x86_64__) && defined(__linux__)
  constexpr long REQUEST = 0x1023, TILE_DATA = 18;  // ARCH_REQ_XCOMP_PERM
  static const bool allowed = HAS_TILES && syscall(SYS_arch_prctl, REQUEST, TILE_DATA) == 0;
  return allowed;
#else
  return false;
#endif
}

extern "C" {

i64 num_threads() { return pool.threads; }

// Use so many threads, the caller's included.
void set_num_threads(i64 threads) {
  std::lock_guard<std::mutex> lock(pool.in_use);
  pool.threads = std::max<i64>(1, threads);
}

void run_parallel(i64 count, void (*work)(void*, i64), void* context) {
  std::unique_lock<std::mutex> lock(pool.in_use, std::defer_lock);
  // Another engine of this process may be using the threads: then this one works alone.
  if (count > 1 && pool.threads > 1 && lock.try_lock()) return pool.run(count, work, context);
  for (i64 i = 0; i < count; i++) work(context, i);
}

// Call each kernel of a tape with its arguments.
void replay(void (*const* kernels)(const void*), const void* const* arguments, i64 count) {
  for (i64 i = 0; i < count; i++) kernels[i](arguments[i]);
}
}
