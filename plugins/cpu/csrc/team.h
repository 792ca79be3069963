// The threads of one operator call: they run its phases together, with a barrier between phases.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <mutex>
#include <thread>
#include <vector>

constexpr int MAX_PHASES = 10;

class Pool;

// What one thread sees of the team during a call.
class Team {
public:
    Team(Pool* pool, int thread, int count) : thread(thread), count(count), pool_(pool) {}

    void barrier();
    // Calls body(item) for some of the items 0..items-1 of this phase; every item falls to one thread. Each has a share
    // of neighbours, so that it reads memory in one stream, and helps with the others' where it is done.
    template <class Body>
    void share(int phase, int64_t items, Body body) {
        if (count == 1) {
            for (int64_t item = 0; item < items; ++item) body(item);
            return;
        }
        for (int i = 0; i < count; ++i) {
            const int whose = (thread + i) % count;
            const int64_t first = items * whose / count, last = items * (whose + 1) / count;
            for (int64_t item; (item = first + next(phase, whose)) < last;) body(item);
        }
    }

    // Lets a phase be shared out again. Between two barriers, in which no thread shares it out.
    void restart(int phase);

    const int thread, count;

private:
    // How many items of a thread's share were taken before.
    int64_t next(int phase, int whose);
    Pool* pool_;
};

// Worker threads that wait awake for a moment after each call, since the next one follows within microseconds.
// A call takes along only those that are awake on a core right then: where other processes have the cores, it goes on
// with fewer threads instead of waiting for them. What is computed does not depend on their number.
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
    enum class State : int { busy, waiting, claimed, called, asleep, woken };

    struct alignas(64) Worker {
        std::atomic<State> state{State::busy};
        std::atomic<uint32_t> beat{0};  // how often it looked whether it is called
        int seat = 0;                   // its number in the team of this call
    };
    // How many items of a thread's share were taken, in each phase: one cache line, mostly its own.
    struct alignas(64) Share {
        std::atomic<int32_t> taken[MAX_PHASES]{};
    };
    static_assert(sizeof(Share) == 64);

    void start(Job job, const void* context);
    void wake_sleepers();
    int claim();
    static bool beats(const Worker& worker, uint32_t since);
    void work(Worker& self);
    void await_call(Worker& self);
    bool sleep(Worker& self);

    const int threads_;
    std::mutex busy_;
    std::mutex sleep_;
    std::condition_variable wake_;
    std::vector<Worker> workers_;
    std::vector<uint32_t> seen_;  // the workers' beats when the call began
    Job job_ = nullptr;
    const void* context_ = nullptr;
    int count_ = 1;
    alignas(64) std::atomic<uint32_t> arrived_{0};
    alignas(64) std::atomic<uint32_t> round_{0};
    std::vector<Share> shares_;
};
