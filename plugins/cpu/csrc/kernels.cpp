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
    const bool padded = a.sequence_lengths != nullptr;
    const Tokens tokens = padded ? Tokens(a.sequence_lengths, a.batch, a.tokens / a.batch, shared_scratch())
                                 : Tokens(a.tokens, shared_scratch());
    pool.run([&](Team& team) {
        Scratch& own = own_scratch();
        float** x = take_tokens(own, tokens.count, a.hidden, a.head.reads_integers());
        float** to = own.take<float*>(tokens.count);
        for (int64_t t = 0; t < tokens.count; ++t)
            rms_norm(a.x + tokens.rows[t] * a.hidden, a.norm, a.eps, a.hidden, x[t]);
        if (a.head.reads_integers()) fix_all(x, tokens.count, a.hidden);
        each_padding(
            tokens, team, a.tokens, [&](int64_t row) { std::fill_n(a.y + row * a.head.rows, a.head.rows, 0.0f); });
        team.share(0, (a.head.rows + block - 1) / block, [&](int64_t item) {
            const int64_t from = item * block, last = std::min(from + block, a.head.rows);
            for (int64_t t = 0; t < tokens.count; ++t) to[t] = a.y + tokens.rows[t] * a.head.rows + from;
            rows_times(a.head, from, last, x, tokens.count, to);
        });
    });
}

}  // namespace
}  // namespace ISA

extern const Kernels NAME(ISA);
const Kernels NAME(ISA) = {ISA::run<ISA::Attention>, ISA::run<ISA::FeedForward>, ISA::head,
    ISA::run<ISA::PrefillAttention>, ISA::run<ISA::PrefillFeedForward>};
