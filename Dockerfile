# llama2-grpc in a container. docs/container.md describes how to build, run and test it.
#
# Both bases are Docker Official Images of 2026-09-19, pinned by the digest of their multi-platform index as recorded in
# github.com/docker-library/repo-info. To update them, copy the tag and the digest from the output of
#   docker buildx imagetools inspect python:3.11-bookworm        (and python:3.11-slim-bookworm)
# to the FROM lines and the labels below. Both bases must have the same Python and the same Debian, because the environment
# is copied from the first to the second. The lock files are for that Python.

FROM python:3.11.16-bookworm@sha256:b99029c95d3d37fb1e4e76d287f7984373dca77c665885986e31b2c95260c13c AS build

# Selects the lock file to install: cpu or cuda.
ARG ACCELERATOR=cpu
# Index with the CPU build of torch (PyPI has the CUDA build); a mirror works, too.
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
ENV PATH=/build/bin:$PATH \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PIP_NO_CACHE_DIR=1
WORKDIR /src

COPY requirements/build.lock requirements/
RUN python -m venv /build \
    && /build/bin/python -m pip install --no-deps --only-binary=:all: --require-hashes --requirement requirements/build.lock

# Dependencies are a separate layer, so that a code change does not rebuild it. The environment has no pip.
COPY requirements/server-${ACCELERATOR}.lock requirements/
RUN python -m venv --without-pip /opt/llama2 \
    && python -m pip --python /opt/llama2/bin/python install --no-deps --only-binary=:all: --require-hashes \
        --extra-index-url "${TORCH_INDEX}" --requirement "requirements/server-${ACCELERATOR}.lock" \
    && python -m pip --python /opt/llama2/bin/python check

# A third of the bytes are tests, headers and symbol tables, which the server never loads; the script lists them.
COPY tools/container/prune.py ./
RUN python prune.py /opt/llama2/lib/python*/site-packages \
    && /opt/llama2/bin/python -c "import torch; from transformers import GenerationConfig, LlamaConfig"

COPY pyproject.toml hatch_build.py README.md LICENSE ./
COPY protos protos/
COPY third_party third_party/
COPY client client/
COPY server server/
RUN python -m pip wheel --no-deps --no-build-isolation --wheel-dir /wheels . \
    && python -m pip --python /opt/llama2/bin/python install --no-deps --no-index --root /package /wheels/*.whl


FROM python:3.11.16-slim-bookworm@sha256:a36c24f9cbdf4fd0f52d67f0823eeac19c2028c637cecc392d97f980d4fec56b

ARG REVISION=unknown
LABEL org.opencontainers.image.title="llama2-grpc" \
    org.opencontainers.image.description="A gRPC text-generation service for Llama-2" \
    org.opencontainers.image.version="0.1.0" \
    org.opencontainers.image.revision="${REVISION}" \
    org.opencontainers.image.licenses="Apache-2.0" \
    org.opencontainers.image.base.name="docker.io/library/python:3.11.16-slim-bookworm" \
    org.opencontainers.image.base.digest="sha256:a36c24f9cbdf4fd0f52d67f0823eeac19c2028c637cecc392d97f980d4fec56b"

# On a GPU, Triton compiles a small C file against the driver at the first start.
ARG ACCELERATOR=cpu
# hadolint ignore=DL3008
RUN if [ "${ACCELERATOR}" = cuda ]; then \
        apt-get update && apt-get install --yes --no-install-recommends gcc libc6-dev && rm -rf /var/lib/apt/lists/*; \
    fi

# The service writes to this directory only, so the root file system can be read-only.
RUN install --directory --owner=65532 --group=65532 --mode=0750 /data
COPY --from=build /opt/llama2 /opt/llama2
COPY --from=build /package /

# The service listens on every address, because the loopback of a container is not reachable from outside. Without API keys
# it therefore does not start, unless LLAMA2_ALLOW_UNAUTHENTICATED=true is set.
ENV PATH=/opt/llama2/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1 \
    HOME=/data \
    HF_HOME=/data/huggingface \
    LLAMA2_DATA_DIRECTORY=/data \
    LLAMA2_LISTEN=0.0.0.0:50051 \
    LLAMA2_HEALTH_LISTEN=0.0.0.0:50052 \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
USER 65532:65532
WORKDIR /data
VOLUME ["/data"]
EXPOSE 50051 50052
# As PID 1, the service handles this signal: it drains, then exits with 0.
STOPSIGNAL SIGTERM
# A 7B takes minutes to load; failures in the start period do not count.
HEALTHCHECK --interval=15s --timeout=10s --start-period=10m --retries=3 \
    CMD ["llama2", "--address", "127.0.0.1:50052", "--timeout", "8", "health"]
# A signal while Python starts waits until the service can handle it; PID 1 would lose it.
ENTRYPOINT ["env", "--block-signal=INT,TERM,HUP", "llama2-server"]
