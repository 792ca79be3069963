// The threads of one operator call: they run its phases together, with a barrier between phases.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <mutex>
#include <thread>
#include <vector>

constexpr int MAX_PHASES = 8;

class Pool;

// What one thread sees of the team during a call.
class Team {
  public:
    Team(Pool* pool, int thread, int count) : thread(thread), count(count), pool_(pool) {}

    void barrier();
    // Calls body(item) for some of the items 0..items-1 of this phase; every item falls to one thread.
    template <class Body>
    void share(int phase, int64_t items, Body body) {
        for (int64_t item = thread; item < items; item = count == 1 ? item + 1 : next(phase)) body(item);
    }

    const int thread, count;

  private:
    int64_t next(int phase);
    Pool* pool_;
};

// Worker threads that wait awake for a moment after each call, since the next one follows within microseconds.
class Pool {
  public:
    explicit Pool(int threads);
    // The pool of this many threads, made once a process.
    static Pool& of(int threads);

    // Calls body(team) on every thread at once. Where another call has the pool, the caller alone runs it.
    template <class Body>
    void run(const Body& body) {
        start([](const void* context, Team& team) { (*static_cast<const Body*>(context))(team); }, &body);
    }

  private:
    friend class Team;
    using Job = void (*)(const void*, Team&);
    void start(Job job, const void* context);
    void work(int thread);
    uint32_t await_call(uint32_t seen);

    const int threads_;
    std::mutex busy_;
    std::mutex sleep_;
    std::condition_variable wake_;
    std::atomic<int> sleeping_{0};
    Job job_ = nullptr;
    const void* context_ = nullptr;
    alignas(64) std::atomic<uint32_t> call_{0};
    alignas(64) std::atomic<uint32_t> arrived_{0};
    alignas(64) std::atomic<uint32_t> round_{0};
    struct alignas(64) Counter {
        std::atomic<int64_t> value{0};
    };
    Counter next_[MAX_PHASES];
};
