# The image for GPUs, with the versions of constraints.txt: docker build -t repae_lite .
# docker run --gpus all --shm-size 16g -v "$PWD":/repae repae_lite repae check
# CUDA's libraries come with PyTorch; from the base comes what finds the host's driver.
FROM nvidia/cuda:13.2.0-base-ubuntu24.04
WORKDIR /opt/repae_lite
COPY reproduce/cluster/image.sh reproduce/cluster/image.sh
RUN sh reproduce/cluster/image.sh system
COPY . .
RUN sh reproduce/cluster/image.sh project
ENV PATH=/opt/venv/bin:$PATH
WORKDIR /repae
CMD ["repae", "--help"]
