# One image for CPU and GPU training.
#   CPU   docker build -t hopescale .
#   CUDA  docker build --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cu130 -t hopescale:cuda .
# How to run it: launch/container/README.md.
ARG BASE_IMAGE=python:3.11-slim-bookworm

FROM ${BASE_IMAGE} AS build
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
# A mounted folder of wheels, for builds without that index; pip reads the variable by itself.
ARG PIP_FIND_LINKS
ARG EXTRAS=demo
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1 PIP_ROOT_USER_ACTION=ignore
RUN python3 -m venv /opt/hopescale
ENV PATH=/opt/hopescale/bin:$PATH
# torch first and without its dependencies: only torch itself comes from the special index.
RUN pip install --no-deps --index-url "${TORCH_INDEX}" 'torch>=2.13,<2.14' \
    && python -c "import importlib.metadata as m; print('torch==' + m.version('torch'))" > /tmp/constraints.txt
WORKDIR /src
COPY pyproject.toml LICENSE README.md ./
COPY hopescale hopescale
COPY data_pipeline data_pipeline
COPY configs configs
RUN pip install -c /tmp/constraints.txt ".[${EXTRAS}]" \
    && python -m compileall -q /opt/hopescale

FROM ${BASE_IMAGE}
ARG VERSION=0.1.0
ARG REVISION=unknown
LABEL org.opencontainers.image.title="hopescale" \
      org.opencontainers.image.description="Train HOPE predictors on clips of V-JEPA 2 embeddings" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"
# A fixed number, because a name means nothing on the host or to Kubernetes; no file may raise its owner's rights.
RUN groupadd --gid 10001 hopescale \
    && useradd --uid 10001 --gid 10001 --no-create-home --home-dir /work --shell /usr/sbin/nologin hopescale \
    && find / -xdev -perm /6000 -type f -exec chmod a-s {} + \
    && install -d -o 10001 -g 10001 /work
COPY --from=build /opt/hopescale /opt/hopescale
# Caches go to /tmp, so that with a read-only root only /work and /tmp need to be writable, by whichever user it runs as.
ENV PATH=/opt/hopescale/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    MPLCONFIGDIR=/tmp/matplotlib \
    TORCHINDUCTOR_CACHE_DIR=/tmp/torchinductor \
    TRITON_CACHE_DIR=/tmp/triton \
    XDG_CACHE_HOME=/tmp/cache
USER 10001:10001
WORKDIR /work
VOLUME ["/work"]
ENTRYPOINT ["hopescale"]
CMD ["--help"]
