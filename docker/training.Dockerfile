# The training image: PyTorch and the training tools, no service. Build from the repository's root:
#   docker build -f docker/training.Dockerfile -t vultus-training .
FROM python:3.11-slim-bookworm
RUN groupadd --gid 10001 vultus && useradd --uid 10001 --gid 10001 --no-create-home --shell /usr/sbin/nologin vultus \
 && install -d -o vultus -g vultus /output
RUN python3 -m venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH \
    PYTHONUNBUFFERED=1
WORKDIR /app
COPY constraints.txt ./
# PyTorch first and alone: it is by far the largest layer and changes least.
RUN pip install --no-cache-dir $(grep -E '^torch(vision)?==' constraints.txt)
COPY pyproject.toml README.md LICENSE ./
COPY service service
COPY training training
RUN pip install --no-cache-dir -c constraints.txt '.[torch]'
COPY models models
USER vultus
VOLUME /output
ENTRYPOINT ["vultus-train"]
CMD ["--help"]
