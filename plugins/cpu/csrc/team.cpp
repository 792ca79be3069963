#include "team.h"

#include <chrono>
#include <functional>
#include <map>
#include <memory>

namespace {

constexpr int SPINS_AT_BARRIER = 1 << 14;               // then others may need the core
constexpr auto AWAKE = std::chrono::microseconds(500);  // longer than what comes between two steps, mostly
constexpr uint32_t SPINS_A_LOOK = 1 << 8;               // between looks at the clock
constexpr int SPINS_AFTER_CALL = 1 << 6;                // a worker's way from the last barrier back to waiting
constexpr int SPINS_AFTER_WAKE = 1 << 12;               // some 100 microseconds, once after a sleep
constexpr int SPINS_FOR_BEAT = 1 << 7;  // some 3 microseconds: a worker that looks meanwhile is on a core

inline void pause() { __builtin_ia32_pause(); }

}  // namespace

void Team::barrier() {
    if (count == 1) return;
    const uint32_t round = pool_->round_.load(std::memory_order_relaxed);
    if (pool_->arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == static_cast<uint32_t>(count)) {
        pool_->arrived_.store(0, std::memory_order_relaxed);
        pool_->round_.store(round + 1, std::memory_order_release);
        return;
    }
    for (int spins = 0; pool_->round_.load(std::memory_order_acquire) == round; ++spins) {
        if (spins < SPINS_AT_BARRIER) {
            pause();
        } else {
            std::this_thread::yield();
        }
    }
}

int64_t Team::next(int phase, int whose) {
    return pool_->shares_[whose].taken[phase].fetch_add(1, std::memory_order_relaxed);
}

void Team::restart(int phase) {
    if (count > 1) pool_->shares_[thread].taken[phase].store(0, std::memory_order_relaxed);
}

Pool::Pool(int threads) : threads_(threads), workers_(threads - 1), seen_(threads - 1), shares_(threads) {
    for (auto& worker : workers_) std::thread(&Pool::work, this, std::ref(worker)).detach();
}

Pool& Pool::of(int threads) {
    // Never destroyed: its threads may outlive main.
    static auto* pools = new std::map<int, std::unique_ptr<Pool>>;
    static std::mutex mutex;
    std::lock_guard<std::mutex> lock(mutex);
    auto& pool = (*pools)[threads];
    if (!pool) pool = std::make_unique<Pool>(threads);
    return *pool;
}

void Pool::start(Job job, const void* context) {
    std::unique_lock<std::mutex> lock(busy_, std::try_to_lock);
    if (threads_ == 1 || !lock.owns_lock()) {
        Team alone(this, 0, 1);
        job(context, alone);
        return;
    }
    wake_sleepers();
    count_ = claim();
    job_ = job;
    context_ = context;
    for (auto& share : shares_) {
        for (auto& taken : share.taken) taken.store(0, std::memory_order_relaxed);
    }
    for (auto& worker : workers_) {
        if (worker.state.load(std::memory_order_relaxed) == State::claimed) {
            worker.state.store(State::called, std::memory_order_release);
        }
    }
    Team team(this, 0, count_);
    job(context, team);
    team.barrier();
}

// Whoever sleeps is woken once, and given a moment to come.
void Pool::wake_sleepers() {
    bool any = false;
    for (auto& worker : workers_) {
        State asleep = State::asleep;
        any |= worker.state.compare_exchange_strong(asleep, State::woken);
    }
    if (!any) return;
    {
        std::lock_guard<std::mutex> guard(sleep_);
        wake_.notify_all();
    }
    for (auto& worker : workers_) {
        for (int spins = 0; spins < SPINS_AFTER_WAKE && worker.state.load() == State::woken; ++spins) pause();
    }
}

// Gives those who wait on a core a seat each; how many there are, the caller with them.
int Pool::claim() {
    for (size_t i = 0; i < workers_.size(); ++i) {
        for (int spins = 0; spins < SPINS_AFTER_CALL && workers_[i].state.load() == State::busy; ++spins) pause();
        seen_[i] = workers_[i].beat.load(std::memory_order_relaxed);
    }
    int count = 1;
    for (size_t i = 0; i < workers_.size(); ++i) {
        State waiting = State::waiting;
        if (beats(workers_[i], seen_[i]) && workers_[i].state.compare_exchange_strong(waiting, State::claimed)) {
            workers_[i].seat = count++;
        }
    }
    return count;
}

// Whether a waiting worker has looked for its call since. Told by what it counts and by no clock: those of two cores
// differ, and one that is read out of order lies before what it is compared with.
bool Pool::beats(const Worker& worker, uint32_t since) {
    for (int spins = 0; spins < SPINS_FOR_BEAT && worker.state.load() == State::waiting; ++spins) {
        if (worker.beat.load(std::memory_order_relaxed) != since) return true;
        pause();
    }
    return false;
}

void Pool::await_call(Worker& self) {
    auto since = std::chrono::steady_clock::now();
    for (uint32_t spins = 1;; ++spins) {
        self.beat.store(self.beat.load(std::memory_order_relaxed) + 1, std::memory_order_relaxed);
        if (self.state.load(std::memory_order_acquire) == State::called) return;
        if (spins % SPINS_A_LOOK == 0 && std::chrono::steady_clock::now() - since > AWAKE && sleep(self)) {
            since = std::chrono::steady_clock::now();
        }
        pause();
    }
}

// False where a call was faster.
bool Pool::sleep(Worker& self) {
    State waiting = State::waiting;
    if (!self.state.compare_exchange_strong(waiting, State::asleep)) return false;
    std::unique_lock<std::mutex> guard(sleep_);
    wake_.wait(guard, [&] { return self.state.load() != State::asleep; });
    self.state.store(State::waiting);
    return true;
}

void Pool::work(Worker& self) {
    while (true) {
        self.state.store(State::waiting, std::memory_order_release);
        await_call(self);
        self.state.store(State::busy, std::memory_order_relaxed);
        Team team(this, self.seat, count_);
        job_(context_, team);
        team.barrier();
    }
}
