# One image, for training on CPUs or on GPUs.
#   CPU   docker build -t hopescale .
#   CUDA  docker build --build-arg CUDA=cu130 -t hopescale:cuda .
# All arguments, and how to run it: launch/container/README.md.
ARG BASE_IMAGE=python:3.11-slim-bookworm
# Empty for CPUs, or the version of CUDA as PyTorch's index spells it.
ARG CUDA=

FROM ${BASE_IMAGE} AS build
# pip reads these by itself. A folder or file they name has to be mounted during the build.
ARG PIP_FIND_LINKS
ARG PIP_INDEX_URL
ARG PIP_EXTRA_INDEX_URL
ARG PIP_CERT
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1 PIP_NO_COMPILE=1 PIP_ROOT_USER_ACTION=ignore
# What only builds has an environment of its own, so that the image gets neither pip nor the SBOM's generator.
RUN python3 -m venv /opt/tools \
    && /opt/tools/bin/pip install 'cyclonedx-bom>=7.5,<8' \
    && python3 -m venv --without-pip /opt/hopescale
# torch alone, without its dependencies, comes from an index of its own; `none` leaves PIP_FIND_LINKS.
ARG CUDA
ARG TORCH_INDEX=https://download.pytorch.org/whl/${CUDA:-cpu}
RUN if [ "${TORCH_INDEX}" = none ]; then set -- --no-index; else set -- --index-url "${TORCH_INDEX}"; fi \
    && /opt/tools/bin/pip --python /opt/hopescale install --no-deps "$@" 'torch>=2.13,<2.14' \
    && /opt/hopescale/bin/python -c "import importlib.metadata as m; print('torch==' + m.version('torch'))" > /opt/constraints.txt
WORKDIR /src
# Of the sources only what names the dependencies: a change anywhere else installs none of them anew.
COPY pyproject.toml ./
COPY hopescale/__init__.py hopescale/
ARG EXTRAS=demo
RUN mkdir -p configs data_pipeline launch/slurm && touch LICENSE README.md launch/slurm/train.sbatch \
    && /opt/tools/bin/pip --python /opt/hopescale install -c /opt/constraints.txt ".[${EXTRAS}]"
COPY LICENSE README.md ./
COPY configs configs
COPY data_pipeline data_pipeline
COPY launch/slurm/train.sbatch launch/slurm/
COPY hopescale hopescale
RUN /opt/tools/bin/pip --python /opt/hopescale install --no-deps --force-reinstall . \
    && /opt/tools/bin/cyclonedx-py environment --pyproject pyproject.toml --mc-type application --output-reproducible \
    --no-validate --output-format JSON --output-file /opt/hopescale/sbom.cdx.json /opt/hopescale/bin/python
# Left out of torch: its own tests, and what only a compiler reads, which is in no use where there is none. The rest is
# compiled on all cores at once; a file that is written for a newer Python does not compile, and is not imported either.
RUN rm -r /opt/hopescale/lib/python3*/site-packages/torch/include /opt/hopescale/lib/python3*/site-packages/torch/test \
    /opt/hopescale/lib/python3*/site-packages/torch/bin/test_* \
    && { /opt/hopescale/bin/python -m compileall -q -j 0 /opt/hopescale/lib || echo "see above for what did not compile"; }

FROM ${BASE_IMAGE}
ARG BASE_IMAGE
ARG CUDA
ARG VERSION=0.1.0
ARG REVISION=unknown
LABEL org.opencontainers.image.title="hopescale" \
      org.opencontainers.image.description="Train HOPE predictors on clips of V-JEPA 2 embeddings" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.base.name="${BASE_IMAGE}"
# A fixed number, because a name means nothing on the host or to Kubernetes. Any other user will do as well: /runs takes
# files of everybody, like /tmp. No file may raise its caller's rights.
RUN groupadd --gid 10001 hopescale \
    && useradd --uid 10001 --gid 10001 --no-create-home --home-dir /tmp --shell /usr/sbin/nologin hopescale \
    && find / -xdev -perm /6000 -type f -exec chmod a-s {} + \
    && install -d -m 1777 /runs
COPY --from=build /opt/hopescale /opt/hopescale
# Everything that is written outside a run goes to /tmp, so that with a read-only root only /runs and /tmp need to be
# writable. Without PYTHONSAFEPATH a file torch.py among the runs would be imported as torch.
ENV PATH=/opt/hopescale/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONSAFEPATH=1 \
    PYTHONUNBUFFERED=1 \
    HOME=/tmp \
    XDG_CACHE_HOME=/tmp/cache \
    MPLCONFIGDIR=/tmp/cache/matplotlib \
    TORCH_EXTENSIONS_DIR=/tmp/cache/torch_extensions \
    TORCHINDUCTOR_CACHE_DIR=/tmp/cache/torchinductor \
    TRITON_CACHE_DIR=/tmp/cache/triton
# Enroot and the NVIDIA runtime give GPUs to images that ask for them; empty asks for none.
ENV NVIDIA_VISIBLE_DEVICES=${CUDA:+all} \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
USER 10001:10001
WORKDIR /runs
VOLUME ["/runs"]
HEALTHCHECK --interval=30s --timeout=10s --start-period=60s --retries=3 \
    CMD ["python", "-m", "hopescale.metrics.healthcheck", "/runs"]
ENTRYPOINT ["hopescale"]
CMD ["--help"]
