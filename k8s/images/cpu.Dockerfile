# syntax=docker/dockerfile:1
# The CPU build: heads, CPU workers, submitters, small endpoints.
#   docker build -f k8s/images/cpu.Dockerfile -t adaptfleet/cpu:0.1.0-ray2.60.0 .
# Every version comes from requirements/cpu.lock, less what only tests use. PIP_INDEX_URL may name a mirror.
ARG PYTHON=3.11-slim-bookworm

FROM python:${PYTHON} AS build
SHELL ["/bin/bash", "-o", "pipefail", "-c"]
ARG PIP_INDEX_URL
ARG TORCH_INDEX_URL=""
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore
WORKDIR /app
RUN python -m venv --copies .venv
COPY requirements/cpu.lock k8s/images/left-out.txt ./
# The lock is complete, so nothing is resolved. torch may come from another index than the rest. triton (1 GB) is there because xgrammar names it
# for its GPU kernels; without it xgrammar, torch and vLLM do on a CPU what they do with it.
RUN grep -vE '^(#|$)' cpu.lock | awk -F'==' 'NR == FNR { out[$1] = 1; next } !($1 in out)' left-out.txt - > wanted.txt \
    && grep '^torch==' wanted.txt > torch.txt && grep -v '^torch==' wanted.txt > rest.txt \
    && .venv/bin/pip install --no-deps ${TORCH_INDEX_URL:+--index-url "$TORCH_INDEX_URL"} -r torch.txt \
    && .venv/bin/pip install --no-deps -r rest.txt \
    && rm -rf .venv/lib/python3*/site-packages/triton \
    && find .venv -depth -type d \( -name __pycache__ -o -name tests -path '*/torch/*' \) -exec rm -rf {} +
COPY pyproject.toml README.md LICENSE ./
COPY platform platform
# Editable, as everywhere: the library finds what lies beside it, such as tune_spaces/.
RUN .venv/bin/pip install --no-deps --no-build-isolation --editable .

FROM python:${PYTHON} AS runtime
# wget: KubeRay's probes; tini: for `docker run`, Kubernetes has its own; libnuma, libgomp: vLLM's CPU kernels; g++: torch.compile.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends bash ca-certificates g++ libgomp1 libnuma1 tini wget \
    && rm -rf /var/lib/apt/lists/* \
    && groupadd --gid 10001 adaptfleet \
    && useradd --uid 10001 --gid 10001 --home-dir /var/lib/adaptfleet --create-home --shell /usr/sbin/nologin adaptfleet
WORKDIR /app
COPY --from=build /app/.venv .venv
COPY platform platform
COPY jobs jobs
COPY serve_apps serve_apps
COPY tune_spaces tune_spaces
ENV PATH=/app/.venv/bin:$PATH \
    PYTHONPATH=/app \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    ADAPTFLEET_HOME=/var/lib/adaptfleet \
    RAY_USAGE_STATS_ENABLED=0 \
    XDG_CACHE_HOME=/tmp/cache \
    TRITON_CACHE_DIR=/tmp/cache/triton \
    TORCHINDUCTOR_CACHE_DIR=/tmp/cache/inductor
USER 10001:10001
# In Kubernetes the probes of the pod count; this is for `docker run`.
HEALTHCHECK --interval=10s --timeout=5s --start-period=60s --retries=6 \
    CMD ["bash", "-c", "wget -q -T 3 -O- http://localhost:52365/api/healthz | grep -q success"]
EXPOSE 6379 8000 8265 10001
ENTRYPOINT ["tini", "--"]
CMD ["ray", "start", "--head", "--block", "--dashboard-host=0.0.0.0"]
