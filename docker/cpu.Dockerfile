# deepseek-trt on a CPU: the whole pipeline but for running engines. Built from the wheel of this checkout:
#   docker build -f docker/cpu.Dockerfile -t deepseek-trt .
#   docker run --rm -v "$PWD:/data" deepseek-trt export DeepSeek-V2-Lite v2-lite
FROM python:3.12-slim AS wheel
WORKDIR /source
COPY . .
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /wheels .

FROM python:3.12-slim
COPY --from=wheel /wheels /wheels
# torch's CPU build: a tenth of the one for CUDA.
RUN pip install --no-cache-dir "torch==2.13.0" --index-url https://download.pytorch.org/whl/cpu \
    && pip install --no-cache-dir /wheels/*.whl \
    && rm -r /wheels \
    && useradd --create-home --uid 10001 user
USER 10001
WORKDIR /data
# The CPU operators, compiled once here instead of at every first start.
RUN python -c "from deepseek_trt.plugins.cpu.library import cpu_library; print(cpu_library().path)"
ENTRYPOINT ["deepseek-trt"]
CMD ["--help"]
