// ONNX Runtime's view of the kernels: four operators of the domain deepseek_trt.cpu, each with one list of inputs.
#include <cstring>
#include <exception>
#include <memory>
#include <new>

#include "args.h"
#include "ort_api.h"
#include "processor.h"

namespace {

const Kernels& kernels() {
    static const Kernels& best = processor::supports_v4() ? kernels_v4 : kernels_v3;
    return best;
}

int threads_of_new_nodes = 1;
ExpertsHit experts_hit;

// Reads one call's inputs in order.
class Inputs {
public:
    Inputs(const ort::Api& api, ort::KernelContext* context) : api_(api), context_(context) {}

    // The next input as rows of its last dimension; the shape is in dims() after it.
    Matrix matrix() {
        const ort::Value* value = nullptr;
        ort::ShapeInfo* info = nullptr;
        Matrix m;
        int type = 0;
        size_t rank = 0;
        api_.call<ort::Status*, const ort::KernelContext*, size_t, const ort::Value**>(
            ort::Place::KernelContext_GetInput, context_, next_++, &value);
        api_.call<ort::Status*, const ort::Value*, void**>(
            ort::Place::GetTensorMutableData, value, reinterpret_cast<void**>(const_cast<char**>(&m.data)));
        api_.call<ort::Status*, const ort::Value*, ort::ShapeInfo**>(ort::Place::GetTensorTypeAndShape, value, &info);
        api_.call<ort::Status*, const ort::ShapeInfo*, int*>(ort::Place::GetTensorElementType, info, &type);
        api_.call<ort::Status*, const ort::ShapeInfo*, size_t*>(ort::Place::GetDimensionsCount, info, &rank);
        rank_ = rank < MOST ? rank : MOST;
        api_.call<ort::Status*, const ort::ShapeInfo*, int64_t*, size_t>(ort::Place::GetDimensions, info, dims_, rank_);
        api_.call<void, ort::ShapeInfo*>(ort::Place::ReleaseTensorTypeAndShapeInfo, info);
        m.type = static_cast<Type>(type);
        m.rows = 1;
        for (size_t i = 0; i + 1 < rank_; ++i) m.rows *= dims_[i];
        m.columns = rank_ ? dims_[rank_ - 1] : 1;
        return m;
    }
    Matrix matrix_if(bool there) { return there ? matrix() : Matrix{}; }
    template <class T>
    const T* data() {
        return reinterpret_cast<const T*>(matrix().data);
    }
    int64_t dim(size_t i) const { return dims_[i]; }

    template <size_t N>
    char* output(size_t index, const int64_t (&dims)[N]) {
        ort::Value* value = nullptr;
        void* data = nullptr;
        api_.call<ort::Status*, ort::KernelContext*, size_t, const int64_t*, size_t, ort::Value**>(
            ort::Place::KernelContext_GetOutput, context_, index, dims, N, &value);
        api_.call<ort::Status*, ort::Value*, void**>(ort::Place::GetTensorMutableData, value, &data);
        return static_cast<char*>(data);
    }

private:
    static constexpr size_t MOST = 8;
    const ort::Api& api_;
    ort::KernelContext* context_;
    size_t next_ = 0, rank_ = 0;
    int64_t dims_[MOST] = {};
};

// The attributes of a node; those that an operator does not have read as 0.
struct Node {
    Node(ort::Table table, const ort::KernelInfo* info) : api(table), info(info) {
        query_compression = number("query_compression"), bias = number("bias");
        experts = number("experts"), shared = number("shared"), biased = number("biased");
        activation = number("activation"), top_k = number("top_k"), groups = number("groups");
        top_groups = number("top_groups"), normalised = number("normalised");
        eps = real("eps"), latent_eps = real("latent_eps"), scale = real("scale"), factor = real("factor");
        this->info = nullptr;  // valid while the node is made only
    }

    int64_t number(const char* name) const {
        int64_t value = 0;
        forget(api.call<ort::Status*, const ort::KernelInfo*, const char*, int64_t*>(
            ort::Place::KernelInfoGetAttribute_int64, info, name, &value));
        return value;
    }
    float real(const char* name) const {
        float value = 0;
        forget(api.call<ort::Status*, const ort::KernelInfo*, const char*, float*>(
            ort::Place::KernelInfoGetAttribute_float, info, name, &value));
        return value;
    }
    void forget(ort::Status* status) const {
        if (status != nullptr) api.call<void, ort::Status*>(ort::Place::ReleaseStatus, status);
    }

    ort::Api api;
    const ort::KernelInfo* info;
    const int threads = threads_of_new_nodes;
    int64_t query_compression, bias, experts, shared, biased, activation, top_k, groups, top_groups, normalised;
    float eps, latent_eps, scale, factor;
};

// inputs: x, cos, sin, past, page_table, past_lengths, norm, kv_a, kv_norm, w_uk, w_uv, o, q[, q_a, q_norm]
// [, kv_a_bias, o_bias[, q_a_bias]]
void attention(const Node& node, ort::KernelContext* context) {
    Inputs in(node.api, context);
    AttentionArgs a{};
    a.x = in.data<float>();
    a.batch = in.dim(0), a.hidden = in.dim(1);
    a.cos = in.data<float>(), a.sin = in.data<float>();
    const Matrix past = in.matrix();
    a.pool_type = past.type, a.pages = in.dim(0), a.page = in.dim(1);
    const int64_t pool_shape[] = {a.pages, a.page, past.columns};
    a.page_table = in.data<int32_t>();
    a.table_width = in.dim(1);
    a.past_lengths = in.data<int32_t>();
    a.norm = in.matrix(), a.kv_a = in.matrix(), a.kv_norm = in.matrix();
    a.w_uk = in.matrix();
    a.heads = in.dim(0), a.nope = in.dim(1), a.rank = in.dim(2);
    a.w_uv = in.matrix();
    a.value = in.dim(1);
    a.o = in.matrix(), a.q = in.matrix();
    a.q_a = in.matrix_if(node.query_compression), a.q_norm = in.matrix_if(node.query_compression);
    a.kv_a_bias = in.matrix_if(node.bias), a.o_bias = in.matrix_if(node.bias);
    a.q_a_bias = in.matrix_if(node.bias && node.query_compression);
    a.eps = node.eps, a.latent_eps = node.latent_eps, a.scale = node.scale;
    a.y = reinterpret_cast<float*>(in.output(0, {a.batch, a.hidden}));
    a.pool = in.output(1, pool_shape);
    if (a.pool != past.data)  // else the cache is written where it lies
        std::memcpy(a.pool, past.data, past.rows * past.columns * (past.type == Type::FLOAT32 ? 4 : 2));
    kernels().attention(a, Pool::of(node.threads));
}

// inputs: x, norm[, router, gate, up, down[, correction_bias]][, shared gate, up, down[, their biases]]
void feed_forward(const Node& node, ort::KernelContext* context) {
    Inputs in(node.api, context);
    FeedForwardArgs a{};
    a.x = in.data<float>();
    a.tokens = in.dim(0), a.hidden = in.dim(1);
    a.norm = in.matrix();
    if (node.experts) {
        a.router = in.matrix();
        a.experts = in.dim(0);
        a.gate = in.matrix();
        a.expert_width = in.dim(1);
        a.up = in.matrix(), a.down = in.matrix();
        if (node.biased) a.bias = in.data<float>();
    }
    if (node.shared) {
        a.shared.gate = in.matrix(), a.shared.up = in.matrix(), a.shared.down = in.matrix();
        a.shared.gate_bias = in.matrix_if(node.bias), a.shared.up_bias = in.matrix_if(node.bias);
        a.shared.down_bias = in.matrix_if(node.bias);
    }
    a.activation = static_cast<Activation>(node.activation);
    a.top_k = node.top_k, a.groups = node.groups, a.top_groups = node.top_groups;
    a.normalised = node.normalised != 0, a.factor = node.factor, a.eps = node.eps;
    a.hit = &experts_hit;
    a.y = reinterpret_cast<float*>(in.output(0, {a.tokens, a.hidden}));
    kernels().feed_forward(a, Pool::of(node.threads));
}

// inputs: x, norm, head
void head(const Node& node, ort::KernelContext* context) {
    Inputs in(node.api, context);
    HeadArgs a{};
    a.x = in.data<float>();
    a.batch = in.dim(0), a.hidden = in.dim(1);
    a.norm = in.matrix(), a.head = in.matrix();
    a.eps = node.eps;
    a.y = reinterpret_cast<float*>(in.output(0, {a.batch, a.head.rows}));
    kernels().head(a, Pool::of(node.threads));
}

// One operator: inputs of any type, outputs float32 and, for attention, the cache in its type.
struct Operator : ort::CustomOp {
    const char* name;
    void (*run)(const Node&, ort::KernelContext*);
    int outputs[2];
    size_t output_count;
};

const Operator& self(const ort::CustomOp* op) { return *static_cast<const Operator*>(op); }

struct Kernel {
    Node node;
    const Operator& op;
};

ort::Status* create(const ort::CustomOp* op, ort::Table table, const ort::KernelInfo* info, void** kernel) {
    *kernel = new (std::nothrow) Kernel{Node(table, info), self(op)};
    return *kernel ? nullptr : ort::Api(table).error("deepseek_trt.cpu: out of memory");
}

ort::Status* compute(void* kernel, ort::KernelContext* context) {
    const Kernel& k = *static_cast<const Kernel*>(kernel);
    try {
        k.op.run(k.node, context);
        return nullptr;
    } catch (const std::exception& error) {
        return k.node.api.error(error.what());
    }
}

Operator make(const char* name, void (*run)(const Node&, ort::KernelContext*), int second_output = ort::UNDEFINED) {
    Operator op{};
    op.version = ort::API_VERSION;
    op.name = name, op.run = run;
    op.outputs[0] = ort::FLOAT, op.outputs[1] = second_output;
    op.output_count = second_output == ort::UNDEFINED ? 1 : 2;
    op.get_name = [](const ort::CustomOp* op) { return self(op).name; };
    op.get_execution_provider = [](const ort::CustomOp*) { return "CPUExecutionProvider"; };
    op.get_input_type = [](const ort::CustomOp*, size_t) -> int { return ort::UNDEFINED; };
    op.get_input_count = [](const ort::CustomOp*) -> size_t { return 1; };
    op.get_output_type = [](const ort::CustomOp* op, size_t i) { return self(op).outputs[i]; };
    op.get_output_count = [](const ort::CustomOp* op) { return self(op).output_count; };
    op.destroy = [](void* kernel) { delete static_cast<Kernel*>(kernel); };
    op.get_input_characteristic = [](const ort::CustomOp*, size_t) -> int { return ort::VARIADIC; };
    op.get_output_characteristic = [](const ort::CustomOp*, size_t) -> int { return ort::REQUIRED; };
    op.get_input_memory = [](const ort::CustomOp*, size_t) { return 0; };
    op.get_variadic_input_min = [](const ort::CustomOp*) { return 1; };
    op.get_variadic_input_homogeneous = [](const ort::CustomOp*) { return 0; };
    op.get_variadic_output_min = [](const ort::CustomOp*) { return 1; };
    op.get_variadic_output_homogeneous = [](const ort::CustomOp*) { return 0; };
    op.create_kernel_v2 = create;
    op.compute_v2 = compute;
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
    static const Operator operators[] = {make("Attention", attention, ort::FLOAT),
        make("AttentionFloat16", attention, ort::FLOAT16), make("FeedForward", feed_forward), make("Head", head)};
    const ort::Table table = base->get_api(ort::API_VERSION);
    const ort::Api api(table);
    if (!processor::supports_v3()) return api.error("deepseek_trt.cpu: this processor has no AVX2");
    ort::Domain* domain = nullptr;
    ort::Status* status = api.call<ort::Status*, const char*, ort::Domain**>(
        ort::Place::CreateCustomOpDomain, "deepseek_trt.cpu", &domain);
    for (const Operator& op : operators) {
        if (status != nullptr) return status;
        status =
            api.call<ort::Status*, ort::Domain*, const ort::CustomOp*>(ort::Place::CustomOpDomain_Add, domain, &op);
    }
    if (status != nullptr) return status;
    return api.call<ort::Status*, ort::SessionOptions*, ort::Domain*>(ort::Place::AddCustomOpDomain, options, domain);
}
