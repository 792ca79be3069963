// ONNX Runtime's view of the kernels: operators, each with one list of inputs.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <exception>
#include <iterator>
#include <string>
#include <type_traits>

#include "args.h"
#include "operators.h"  // generated
#include "processor.h"

namespace {

const Kernels& kernels() {
    static const Kernels& best = processor::supports_v4() ? kernels_v4 : kernels_v3;
    return best;
}

int threads_of_new_nodes = 1;
ExpertsHit experts_hit;

// A node of the graph while its session lives.
template <class Op>
struct Node {
    Node(ort::Table table, const ort::KernelInfo* info) : api(table), attributes(AttributeReader(api, info)) {}

    const ort::Api api;
    const typename Op::Attributes attributes;
    const int threads = threads_of_new_nodes;
};

// One call of a node.
template <class Op>
struct Call {
    const Node<Op>& node;
    ort::KernelContext* const context;
    const typename Op::Attributes& attributes = node.attributes;
    const typename Op::Inputs in{attributes, InputReader(node.api, context)};

    // The memory of an output of this shape.
    template <size_t N>
    char* output(size_t index, const int64_t (&dims)[N]) const {
        return output(index, dims, N);
    }
    char* output(size_t index, const int64_t* dims, size_t rank) const {
        ort::Value* value = nullptr;
        void* data = nullptr;
        node.api.call(ort::KernelContext_GetOutput, context, index, dims, rank, &value);
        node.api.call(ort::GetTensorMutableData, value, &data);
        return static_cast<char*>(data);
    }
    Pool& pool() const { return Pool::of(node.threads); }
};

int64_t bytes_of(Type type) { return type == Type::FLOAT32 ? 4 : 2; }

// The cache is written where it lies, or where ONNX Runtime wants it elsewhere, in a copy.
char* written(char* output, const Tensor& past, int64_t bytes) {
    if (output != past.data) std::memcpy(output, past.data, past.rows * past.columns * bytes);
    return output;
}

// The pools of a layer: latents, or codes, and rope parts with scales.
template <class Op, class = void>
struct Pools {
    static void give(AttentionArgs& a, const Call<Op>& call) {
        const auto& past = call.in.past;
        a.pool_type = past.type, a.latent = past.dims[2];
        a.pool = written(call.output(1, {a.pages, a.page, past.columns}), past, bytes_of(past.type));
    }
};
template <class Op>
struct Pools<Op, std::void_t<decltype(Op::Inputs::past_rope)>> {
    static void give(AttentionArgs& a, const Call<Op>& call) {
        const auto &past = call.in.past, &rest = call.in.past_rope;
        a.cache = static_cast<CacheFormat>(call.attributes.cache_format), a.group = call.attributes.cache_group;
        a.pool_type = rest.type, a.codes = past.dims[2], a.rest_width = rest.columns, a.rest_rows = rest.rows;
        a.latent = a.codes + a.rest_width - (a.group > 0 ? a.codes / a.group : 0);
        a.pool = written(call.output(1, {a.pages, a.page, past.columns}), past, 1);
        a.rest = written(call.output(2, {rest.dims[0], rest.dims[1], rest.columns}), rest, bytes_of(rest.type));
    }
};

template <class Op>
AttentionArgs attention_args(const Call<Op>& call) {
    const auto& node = call.attributes;
    const auto& in = call.in;
    AttentionArgs a{};
    a.x = in.x.template as<float>();
    a.cos = in.cos.template as<float>(), a.sin = in.sin.template as<float>();
    a.batch = in.past_lengths.dims[0], a.hidden = in.x.columns;
    a.sequence_lengths = in.sequence_lengths.template as<int32_t>();
    a.sequence = in.cos.dims[1], a.tokens = in.x.rows, a.sequences = in.sequence_lengths.dims[0];
    a.pages = in.past.dims[0], a.page = in.past.dims[1];
    a.page_table = in.page_table.template as<int32_t>();
    a.table_rows = in.page_table.dims[0], a.table_width = in.page_table.dims[1];
    a.rope_rows = in.cos.rows, a.rope = in.cos.columns, a.lengths = in.past_lengths.dims[0];
    if (in.sin.rows != a.rope_rows || in.sin.columns != a.rope) a.rope_rows = -1;
    a.past_lengths = in.past_lengths.template as<int32_t>();
    a.heads = in.w_uk.dims[0], a.nope = in.w_uk.dims[1], a.rank = in.w_uk.dims[2], a.value = in.w_uv.dims[1];
    a.norm = in.norm_weight, a.q_a = in.q_a, a.q_norm = in.q_norm_weight, a.q = in.q;
    a.kv_a = in.kv_a, a.kv_norm = in.kv_norm_weight, a.w_uk = in.w_uk, a.w_uv = in.w_uv, a.o = in.o;
    a.q_a_bias = in.q_a_bias, a.kv_a_bias = in.kv_a_bias, a.o_bias = in.o_bias;
    a.eps = node.eps, a.latent_eps = node.latent_eps, a.scale = node.scale;
    a.y = reinterpret_cast<float*>(call.output(0, {in.x.rows, a.hidden}));
    Pools<Op>::give(a, call);
    return a;
}

template <class Op>
void attention(const Call<Op>& call) {
    kernels().attention(attention_args(call), call.pool());
}

template <class Op>
void prefill_attention(const Call<Op>& call) {
    kernels().prefill_attention(attention_args(call), call.pool());
}

template <class Op>
FeedForwardArgs feed_forward_args(const Call<Op>& call) {
    const auto& node = call.attributes;
    const auto& in = call.in;
    FeedForwardArgs a{};
    a.x = in.x.template as<float>();
    a.sequence_lengths = in.sequence_lengths.template as<int32_t>(), a.batch = in.sequence_lengths.dims[0];
    a.tokens = in.x.dims[0], a.hidden = in.x.dims[1];
    a.norm = in.norm_weight;
    a.experts = in.router.dims[0], a.expert_width = in.gate.dims[1];
    a.router = in.router, a.gate = in.gate, a.up = in.up, a.down = in.down;
    a.bias = in.correction.template as<float>(), a.biases = in.correction.columns;
    a.shared = {
        in.shared_gate, in.shared_up, in.shared_down, in.shared_gate_bias, in.shared_up_bias, in.shared_down_bias};
    a.activation = static_cast<Activation>(node.activation);
    a.top_k = node.top_k, a.groups = node.groups, a.top_groups = node.top_groups;
    a.normalised = node.normalised != 0, a.factor = node.factor, a.eps = node.eps;
    a.y = reinterpret_cast<float*>(call.output(0, {a.tokens, a.hidden}));
    return a;
}

void feed_forward(const Call<operators::FeedForward>& call) {
    auto a = feed_forward_args(call);
    a.hit = &experts_hit;
    kernels().feed_forward(a, call.pool());
}

void prefill_feed_forward(const Call<operators::PrefillFeedForward>& call) {
    kernels().prefill_feed_forward(feed_forward_args(call), call.pool());
}

void head(const Call<operators::Head>& call) {
    const auto& in = call.in;
    HeadArgs a{};
    a.x = in.x.as<float>();
    a.sequence_lengths = in.sequence_lengths.as<int32_t>(), a.batch = in.sequence_lengths.dims[0];
    a.tokens = in.x.dims[0], a.hidden = in.x.dims[1];
    a.norm = in.norm_weight, a.head = in.head;
    a.eps = call.attributes.eps;
    a.y = reinterpret_cast<float*>(call.output(0, {a.tokens, a.head.rows}));
    kernels().head(a, call.pool());
}

template <class Op, float (*FUNCTION)(float)>
void each(const Call<Op>& call) {
    const auto& x = call.in.x;
    const float* from = x.template as<float>();
    std::transform(from, from + x.rows * x.columns, reinterpret_cast<float*>(call.output(0, x.dims, x.rank)), FUNCTION);
}

// What `body` gives, or an error in the operator's name where it throws.
template <class Op, class Body>
ort::Status* guarded(const ort::Api& api, Body body) {
    try {
        body();
        return nullptr;
    } catch (const std::exception& error) {
        return api.error((std::string(operators::CPU_DOMAIN) + "." + Op::NAME + ": " + error.what()).c_str());
    }
}

template <class Op>
ort::Status* create(const ort::CustomOp*, ort::Table table, const ort::KernelInfo* info, void** kernel) {
    return guarded<Op>(ort::Api(table), [&] { *kernel = new Node<Op>(table, info); });
}

template <class Op, void (*RUN)(const Call<Op>&)>
ort::Status* compute(void* kernel, ort::KernelContext* context) {
    const auto& node = *static_cast<const Node<Op>*>(kernel);
    return guarded<Op>(node.api, [&] { RUN(Call<Op>{node, context}); });
}

// To ONNX Runtime an operator takes any number of inputs of any type.
template <class Op, void (*RUN)(const Call<Op>&)>
ort::CustomOp make() {
    ort::CustomOp op{};
    op.version = ort::API_VERSION;
    op.get_name = [](const ort::CustomOp*) { return Op::NAME; };
    op.get_execution_provider = [](const ort::CustomOp*) { return "CPUExecutionProvider"; };
    op.get_input_type = [](const ort::CustomOp*, size_t) -> int { return ort::UNDEFINED; };
    op.get_input_count = [](const ort::CustomOp*) -> size_t { return 1; };
    op.get_output_type = [](const ort::CustomOp*, size_t i) { return Op::OUTPUTS[i]; };
    op.get_output_count = [](const ort::CustomOp*) { return std::size(Op::OUTPUTS); };
    op.destroy = [](void* kernel) { delete static_cast<Node<Op>*>(kernel); };
    op.get_input_characteristic = [](const ort::CustomOp*, size_t) -> int { return ort::VARIADIC; };
    op.get_output_characteristic = [](const ort::CustomOp*, size_t) -> int { return ort::REQUIRED; };
    op.get_input_memory = [](const ort::CustomOp*, size_t) { return 0; };
    op.get_variadic_input_min = [](const ort::CustomOp*) { return 1; };
    op.get_variadic_input_homogeneous = [](const ort::CustomOp*) { return 0; };
    op.get_variadic_output_min = [](const ort::CustomOp*) { return 1; };
    op.get_variadic_output_homogeneous = [](const ort::CustomOp*) { return 0; };
    op.create_kernel_v2 = create<Op>;
    op.compute_v2 = compute<Op, RUN>;
    return op;
}

}  // namespace

#define EXPORTED extern "C" __attribute__((visibility("default")))

// How many threads the sessions use that are made from now on.
EXPORTED void deepseek_trt_cpu_threads(int threads) { threads_of_new_nodes = threads > 1 ? threads : 1; }

// What all sessions of the process have counted so far.
EXPORTED void deepseek_trt_cpu_experts_hit(int64_t* layers, int64_t* experts) {
    *layers = experts_hit.layers.load(std::memory_order_relaxed);
    *experts = experts_hit.experts.load(std::memory_order_relaxed);
}

EXPORTED ort::Status* RegisterCustomOps(ort::SessionOptions* options, const ort::ApiBase* base) {
    using namespace operators;
    static const ort::CustomOp all[] = {make<Attention, attention<Attention>>(),
        make<AttentionFloat16, attention<AttentionFloat16>>(), make<AttentionNarrow, attention<AttentionNarrow>>(),
        make<AttentionNarrowFloat16, attention<AttentionNarrowFloat16>>(),
        make<PrefillAttentionNarrow, prefill_attention<PrefillAttentionNarrow>>(),
        make<PrefillAttentionNarrowFloat16, prefill_attention<PrefillAttentionNarrowFloat16>>(),
        make<FeedForward, feed_forward>(), make<Head, head>(),
        make<PrefillAttention, prefill_attention<PrefillAttention>>(),
        make<PrefillAttentionFloat16, prefill_attention<PrefillAttentionFloat16>>(),
        make<PrefillFeedForward, prefill_feed_forward>(), make<Cos, each<Cos, std::cos>>(),
        make<Sin, each<Sin, std::sin>>()};
    const ort::Api api(base->get_api(ort::API_VERSION));
    if (!processor::supports_v3()) return api.error("deepseek_trt.cpu: this processor has no AVX2");
    ort::Domain* domain = nullptr;
    ort::Status* status = api.call(ort::CreateCustomOpDomain, CPU_DOMAIN, &domain);
    for (const ort::CustomOp& op : all) {
        if (status == nullptr) status = api.call(ort::CustomOpDomain_Add, domain, &op);
    }
    return status != nullptr ? status : api.call(ort::AddCustomOpDomain, options, domain);
}
