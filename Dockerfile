# Training and inference on NVIDIA GPUs: docs/docker.md. The wheel of torch brings CUDA, the host its driver.
FROM python:3.12-slim

# without "demo", "test" and federated learning
ARG EXTRAS=dicom,export,mlflow

WORKDIR /opt/monai-ahm
COPY pyproject.toml setup.cfg README.md LICENSE ./
COPY ahm_transforms ahm_transforms
COPY ahm_networks ahm_networks
COPY ahm_engines ahm_engines
# the versions are those of setup.cfg
# hadolint ignore=DL3013
RUN pip install --no-cache-dir ".[${EXTRAS}]"

# who runs the container with --user needs to write nothing but the mounted folders
RUN useradd --create-home --uid 1000 ahm && install -d -o ahm /workspace /data /output
WORKDIR /workspace
COPY --chown=ahm bundles bundles
USER 1000

ENV PYTHONUNBUFFERED=1 \
    MPLCONFIGDIR=/tmp/matplotlib
CMD ["ahm", "--help"]
