// A thread pool that shares the work of a step.
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

// How long a thread spins for work before it sleeps: longer than a chunk takes, but too short to heat an idle machine.
constexpr auto SPIN_TIME = std::chrono::microseconds(50);

// Threads that take chunks of one stage after another.
//
// One word, the ticket, holds the stage number and how many of its chunks are left. The thread that finishes the last
// chunk of a stage opens the next stage. Threads wait for chunks, never for another thread: a thread that loses its
// core to another process delays the others only if it holds a chunk at that moment. Stage numbers never repeat, so a
// thread that slept through half a step cannot take a chunk of a stage other than the one it saw.
class ThreadPool {
  public:
    explicit ThreadPool(int threads) {
        try {
            for (int index = 1; index < threads; ++index)
                workers_.emplace_back([this, index] { work(index, stopping_); });
        } catch (const std::system_error &) {
            // The system allows no more threads: the existing ones do all the work.
        }
    }

    // No step is running, so the workers do not call the derived class, which is already destroyed.
    virtual ~ThreadPool() {
        stopping_.store(true);
        publish((ticket_.load() | CHUNKS_LEFT) + 1);
        for (std::thread &worker : workers_) worker.join();
    }

  protected:
    virtual void run_chunk(int thread, int chunk) = 0;
    virtual int next_stage() = 0;  // prepares the next stage and returns its number of chunks; 0 ends the run

    // Runs stages until `next_stage` returns 0; the calling thread is thread 0.
    void run() {
        finished_.store(false);
        open_stage();
        work(0, finished_);
    }

  private:
    static constexpr std::uint64_t CHUNKS_LEFT = (1u << 24) - 1;  // mask of the chunk count in a ticket

    void work(int thread, const std::atomic<bool> &stop) {
        for (;;) {
            std::uint64_t ticket = ticket_.load(std::memory_order_acquire);
            // Read `stop` after the ticket: it is set before the last ticket, and a thread that waits on that ticket
            // would wait forever.
            if (stop.load(std::memory_order_acquire)) return;
            if ((ticket & CHUNKS_LEFT) == 0) {
                wait(ticket);
            } else if (ticket_.compare_exchange_weak(ticket, ticket - 1, std::memory_order_acq_rel)) {
                run_chunk(thread, chunk_at(chunks_ - static_cast<int>(ticket & CHUNKS_LEFT)));
                if (unfinished_.fetch_sub(1, std::memory_order_acq_rel) == 1) open_stage();
            }
        }
    }

    // Returns the chunk to take after `taken` others. Threads mostly alternate, so this order lets each thread continue
    // in memory where its last chunk ended, as if it owned one part of the stage.
    int chunk_at(int taken) const {
        const int parts = static_cast<int>(workers_.size()) + 1, part = taken % parts;
        return part * (chunks_ / parts) + std::min(part, chunks_ % parts) + taken / parts;
    }

    void open_stage() {
        chunks_ = next_stage();
        unfinished_.store(chunks_, std::memory_order_relaxed);
        if (chunks_ == 0) finished_.store(true, std::memory_order_release);
        publish(((ticket_.load(std::memory_order_relaxed) | CHUNKS_LEFT) + 1) + static_cast<std::uint64_t>(chunks_));
    }

    void publish(std::uint64_t ticket) {
        ticket_.store(ticket);
        if (sleepers_.load() == 0) return;
        const std::lock_guard<std::mutex> lock(mutex_);
        wake_.notify_all();
    }

    void wait(std::uint64_t seen) {
        const auto until = std::chrono::steady_clock::now() + SPIN_TIME;
        do {
            for (int spin = 0; spin < 16; ++spin) {
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

    int chunks_ = 0;  // of the stage; written before its ticket, read after one of its chunks is taken
    std::atomic<std::uint64_t> ticket_{0};
    std::atomic<int> unfinished_{0};
    std::atomic<int> sleepers_{0};
    std::atomic<bool> finished_{true}, stopping_{false};
    std::mutex mutex_;
    std::condition_variable wake_;
    std::vector<std::thread> workers_;
};

}  // namespace
