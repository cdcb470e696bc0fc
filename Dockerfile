# syntax=docker/dockerfile:1
# A slim CPU image by default:
#   docker build -t gossamer .
# The same with CUDA (the wheel index decides which build of torch is installed):
#   docker build -t gossamer:cuda --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cu130 .
# Run it; adapters, keys and the base model live in the volume:
#   docker run -p 8000:8000 -v gossamer:/data gossamer

ARG PYTHON=3.11

FROM python:${PYTHON}-slim AS build
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
RUN python -m venv /opt/gossamer
ENV PATH=/opt/gossamer/bin:$PATH
WORKDIR /src
# torch first and alone: it changes seldom and is most of the image.
COPY constraints.txt ./
RUN pip install --constraint constraints.txt --extra-index-url "${TORCH_INDEX}" torch
COPY pyproject.toml README.md LICENSE ./
COPY server server
COPY kernels kernels
COPY adapters_store adapters_store
COPY trainer trainer
RUN pip install --constraint constraints.txt --extra-index-url "${TORCH_INDEX}" .

FROM python:${PYTHON}-slim
# libgomp: torch's and numba's threads.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends libgomp1 \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --system --create-home --uid 10001 gossamer \
    && install --directory --owner gossamer --group gossamer /data
COPY --from=build /opt/gossamer /opt/gossamer
ENV PATH=/opt/gossamer/bin:$PATH \
    GOSSAMER_DATA_DIR=/data \
    PYTHONUNBUFFERED=1
USER gossamer
VOLUME /data
EXPOSE 8000
# The first start fetches and converts the default base model; until then it is alive but not ready.
HEALTHCHECK --interval=10s --timeout=3s --start-period=300s --retries=3 \
    CMD ["python", "-c", "import urllib.request as u; u.urlopen('http://127.0.0.1:8000/health/ready', timeout=2)"]
STOPSIGNAL SIGTERM
ENTRYPOINT ["gossamer"]
CMD ["up", "--host", "0.0.0.0", "--port", "8000"]
