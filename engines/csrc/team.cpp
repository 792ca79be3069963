#include "team.h"

#include <map>
#include <memory>

namespace {

constexpr int SPINS_AT_BARRIER = 1 << 14;  // then others may need the core
constexpr int SPINS_BEFORE_SLEEP = 1 << 13;  // some 200 microseconds

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

int64_t Team::next(int phase) {
    return pool_->next_[phase].value.fetch_add(1, std::memory_order_relaxed);
}

Pool::Pool(int threads) : threads_(threads) {
    for (int thread = 1; thread < threads; ++thread) std::thread(&Pool::work, this, thread).detach();
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
    job_ = job;
    context_ = context;
    for (auto& counter : next_) counter.value.store(threads_, std::memory_order_relaxed);
    call_.fetch_add(1);
    if (sleeping_.load() > 0) {
        std::lock_guard<std::mutex> guard(sleep_);
        wake_.notify_all();
    }
    Team team(this, 0, threads_);
    job(context, team);
    team.barrier();
}

uint32_t Pool::await_call(uint32_t seen) {
    for (int spins = 0; spins < SPINS_BEFORE_SLEEP; ++spins) {
        const uint32_t call = call_.load(std::memory_order_acquire);
        if (call != seen) return call;
        pause();
    }
    std::unique_lock<std::mutex> guard(sleep_);
    sleeping_.fetch_add(1);
    wake_.wait(guard, [&] { return call_.load() != seen; });
    sleeping_.fetch_sub(1);
    return call_.load();
}

void Pool::work(int thread) {
    uint32_t seen = 0;
    while (true) {
        seen = await_call(seen);
        Team team(this, thread, threads_);
        job_(context_, team);
        team.barrier();
    }
}
