// The kernels of one instruction set: compiled once with -DISA=v3 and once with -DISA=v4.
#include "attention.h"
#include "check.h"
#include "feed_forward.h"
#include "prefill_attention.h"
#include "prefill_feed_forward.h"

#define NAME_OF(isa) kernels_##isa
#define NAME(isa) NAME_OF(isa)

namespace ISA {
namespace {

template <class Half, class Args>
void run(const Args& args, Pool& pool) {
    check::args(args);
    const Half half(args, shared_scratch());
    pool.run([&](Team& team) { half.run(team); });
}

void head(const HeadArgs& a, Pool& pool) {
    check::args(a);
    constexpr int64_t block = 64;
    pool.run([&](Team& team) {
        Scratch& own = own_scratch();
        float** x = take_tokens(own, a.batch, a.hidden, a.head.reads_integers());
        float** to = own.take<float*>(a.batch);
        for (int64_t b = 0; b < a.batch; ++b) rms_norm(a.x + b * a.hidden, a.norm, a.eps, a.hidden, x[b]);
        if (a.head.reads_integers()) fix_all(x, a.batch, a.hidden);
        team.share(0, (a.head.rows + block - 1) / block, [&](int64_t item) {
            const int64_t from = item * block, last = std::min(from + block, a.head.rows);
            for (int64_t b = 0; b < a.batch; ++b) to[b] = a.y + b * a.head.rows + from;
            rows_times(a.head, from, last, x, a.batch, to);
        });
    });
}

}  // namespace
}  // namespace ISA

extern const Kernels NAME(ISA);
const Kernels NAME(ISA) = {ISA::run<ISA::Attention>, ISA::run<ISA::FeedForward>, ISA::head,
    ISA::run<ISA::PrefillAttention>, ISA::run<ISA::PrefillFeedForward>};
