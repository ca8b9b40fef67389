# CPU:   docker build -t quadriga --build-arg TORCH_INDEX=URL_OF_THE_CPU_BUILDS .
# CUDA:  docker build -t quadriga .
# Run:   docker run --rm --shm-size 1g -v "$PWD/outputs:/train/outputs" quadriga train configs/debug/debug.toml --ngpu 2
#        (with GPUs: --gpus all)
#
# The builds of torch on PyPI contain the CUDA libraries; TORCH_INDEX names PyTorch's index of CPU builds, if you want
# the small one.
ARG PYTHON=3.11
FROM python:${PYTHON}-slim

ARG TORCH_INDEX=""
WORKDIR /opt/quadriga

# The requirements first, so that a change of the code does not install torch again.
COPY requirements.txt ./
RUN PIP_EXTRA_INDEX_URL="${TORCH_INDEX}" pip install --no-cache-dir -r requirements.txt

COPY pyproject.toml setup.py README.md LICENSE ./
COPY quadriga quadriga
COPY configs configs
RUN pip install --no-cache-dir --no-deps . && rm -rf build

RUN useradd --create-home quadriga && mkdir /train && chown quadriga /train
USER quadriga
WORKDIR /train
RUN quadriga configs --copy configs && mkdir outputs

# The process of the container handles signals: docker stop sends SIGTERM, and the run saves.
ENTRYPOINT ["quadriga"]
CMD ["--help"]
