# megatron_samoe on CPUs (written, not built yet):
#   docker build -t megatron_samoe . && docker run --rm -it --shm-size 2g megatron_samoe quickstart
# Ranks of one host exchange tokens through /dev/shm, which needs more room than Docker's 64 MB.
FROM python:3.11-slim-bookworm AS build
RUN apt-get update && apt-get install -y --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*
RUN python -m venv /opt/samoe
ENV PATH=/opt/samoe/bin:$PATH
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
RUN pip install --no-cache-dir --index-url "$TORCH_INDEX" "torch>=2.11,<3" && \
    pip install --no-cache-dir numpy "setuptools>=77" wheel
COPY . /src
RUN pip install --no-cache-dir --no-build-isolation "/src[data,serve,hf]"

FROM python:3.11-slim-bookworm
RUN apt-get update && apt-get install -y --no-install-recommends libgomp1 && rm -rf /var/lib/apt/lists/*
COPY --from=build /opt/samoe /opt/samoe
ENV PATH=/opt/samoe/bin:$PATH
WORKDIR /work
ENTRYPOINT ["megatron-samoe"]
