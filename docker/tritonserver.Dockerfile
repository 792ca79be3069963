# A model repository of deepseek-trt in NVIDIA's tritonserver container:
#   deepseek-trt model-repository ./v2-lite ./repository
#   docker build -f docker/tritonserver.Dockerfile --build-arg REPOSITORY=repository -t v2-lite .
#   docker run --rm --gpus all -p 127.0.0.1:8000:8000 v2-lite
# The image holds the repository and with it the runtime, not the deepseek-trt package: serving needs no torch.
ARG TRITONSERVER=nvcr.io/nvidia/tritonserver:24.10-py3
# hadolint ignore=DL3006
FROM ${TRITONSERVER}
ARG REPOSITORY=repository
# What `model-repository` prints for an ONNX Runtime model; for plans: cuda-bindings and the TensorRT that built them.
ARG REQUIREMENTS="numpy>=1.26,<2 onnxruntime>=1.23,<2 tokenizers>=0.21,<1 jinja2>=3.1.6,<4 ml_dtypes>=0.5,<1 llguidance>=1.9,<2"
# hadolint ignore=DL3013,SC2086
RUN pip install --no-cache-dir ${REQUIREMENTS} && useradd --create-home --uid 10001 server
COPY --chown=10001 ${REPOSITORY} /repository
USER 10001
EXPOSE 8000 8001 8002
# All addresses of the container: what it publishes to (above: loopback) and what stands before it decide who gets in.
ENTRYPOINT ["/repository/serve.sh", "--http-address=0.0.0.0", "--grpc-address=0.0.0.0"]
