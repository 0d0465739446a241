# JupyterLab on the notebooks, in the environment of requirements.lock:
#
#     docker build -t rdd_lib .
#     docker run --rm -p 127.0.0.1:8888:8888 rdd_lib     # open the address with the token that it prints
#     docker run --rm rdd_lib make test
#
# On Linux the torch of the lock brings its CUDA libraries (most of its 7 GB) and runs without a GPU as well. With one,
# the host needs NVIDIA's driver and container toolkit: docker run --gpus all ... BASE is for another system, with CUDA's
# compiler say: docker build --build-arg BASE=nvidia/cuda:<version>-devel-ubuntu24.04 -t rdd_lib .
ARG BASE=python:3.12-slim
FROM ${BASE}

RUN apt-get update \
 && apt-get install -y --no-install-recommends git make $(command -v python3 > /dev/null || echo python3-venv) \
 && rm -rf /var/lib/apt/lists/* \
 && useradd --create-home reader \
 && install -d -o reader -g reader /home/reader/rdd_lib
USER reader
WORKDIR /home/reader/rdd_lib

# first what seldom changes, so that a changed notebook does not install torch again
COPY --chown=reader:reader requirements.lock ./
RUN python3 -m venv .venv \
 && .venv/bin/python -m pip install --no-cache-dir --disable-pip-version-check --no-deps -r requirements.lock
COPY --chown=reader:reader . .
RUN make .venv/ready

EXPOSE 8888
CMD ["make", "lab", "LAB=--no-browser --ip 0.0.0.0"]
