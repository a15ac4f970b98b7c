// Threads that share the work of a step.
#pragma once

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <system_error>
#include <thread>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace {

// How long a thread watches for work before it sleeps: longer than a chunk takes, too short to warm an idle machine.
constexpr auto SPIN_TIME = std::chrono::microseconds(50);

// Threads that take chunks of one stage after another.
//
// One word says which stage it is and how many of its chunks nobody has taken yet. Whoever finishes the last chunk of a
// stage opens the next one. So nothing waits for a thread, only for chunks: one whose core went to another process
// holds up nobody, unless that happens within a chunk. The stage number never comes again, so a thread that slept
// through half a step cannot take a chunk of another stage than it saw.
class Team {
  public:
    explicit Team(int threads) {
        try {
            for (int index = 1; index < threads; ++index) workers_.emplace_back([this, index] { help(index, dismissed_); });
        } catch (const std::system_error &) {
            // The system gives no more threads: those there are do all the work.
        }
    }

    // Nothing runs any more, so the workers need nothing of the derived class, which is gone already.
    virtual ~Team() {
        dismissed_.store(true);
        announce((ticket_.load() | TAKEN) + 1);
        for (std::thread &worker : workers_) worker.join();
    }

  protected:
    virtual void run_chunk(int thread, int chunk) = 0;
    virtual int next_stage() = 0;  // prepares the next stage and returns its number of chunks; 0 ends the run

    // Run stages until `next_stage` returns 0; the calling thread is thread 0.
    void run() {
        finished_.store(false);
        open();
        help(0, finished_);
    }

  private:
    static constexpr std::uint64_t TAKEN = (1u << 24) - 1;  // the part of a ticket that counts chunks

    void help(int thread, const std::atomic<bool> &over) {
        for (;;) {
            std::uint64_t ticket = ticket_.load(std::memory_order_acquire);
            // In this order: `over` is set before the last ticket, so whoever waits on that one would wait for ever.
            if (over.load(std::memory_order_acquire)) return;
            if ((ticket & TAKEN) == 0) {
                wait(ticket);
            } else if (ticket_.compare_exchange_weak(ticket, ticket - 1, std::memory_order_acq_rel)) {
                run_chunk(thread, dealt(chunks_ - static_cast<int>(ticket & TAKEN)));
                if (unfinished_.fetch_sub(1, std::memory_order_acq_rel) == 1) open();
            }
        }
    }

    // Which chunk is taken next after so many others. As a rule threads take turns: so dealt out, each goes on in the
    // memory where its last chunk ended, as if it had a part of the stage for itself.
    int dealt(int taken) const {
        const int parts = static_cast<int>(workers_.size()) + 1, part = taken % parts;
        return part * (chunks_ / parts) + std::min(part, chunks_ % parts) + taken / parts;
    }

    void open() {
        chunks_ = next_stage();
        unfinished_.store(chunks_, std::memory_order_relaxed);
        if (chunks_ == 0) finished_.store(true, std::memory_order_release);
        announce(((ticket_.load(std::memory_order_relaxed) | TAKEN) + 1) + static_cast<std::uint64_t>(chunks_));
    }

    void announce(std::uint64_t ticket) {
        ticket_.store(ticket);
        if (sleepers_.load() == 0) return;
        const std::lock_guard<std::mutex> lock(mutex_);
        wake_.notify_all();
    }

    void wait(std::uint64_t seen) {
        const auto until = std::chrono::steady_clock::now() + SPIN_TIME;
        do {
            for (int turn = 0; turn < 16; ++turn) {
                if (ticket_.load(std::memory_order_acquire) != seen) return;
#if defined(__x86_64__)
                _mm_pause();
#else
                asm volatile("yield");
#endif
            }
        } while (std::chrono::steady_clock::now() < until);
        std::unique_lock<std::mutex> lock(mutex_);
        sleepers_.fetch_add(1);
        wake_.wait(lock, [&] { return ticket_.load() != seen; });
        sleepers_.fetch_sub(1);
    }

    int chunks_ = 0;  // of the stage; written before its ticket, read after a chunk of it was taken
    std::atomic<std::uint64_t> ticket_{0};
    std::atomic<int> unfinished_{0};
    std::atomic<int> sleepers_{0};
    std::atomic<bool> finished_{true}, dismissed_{false};
    std::mutex mutex_;
    std::condition_variable wake_;
    std::vector<std::thread> workers_;
};

}  // namespace
