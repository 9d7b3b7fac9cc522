# The serving image: no compiler, no torch, no root. Build from the repository's root:
#   docker build -f docker/service.Dockerfile -t vultus .
FROM python:3.11-slim-bookworm AS build
WORKDIR /app
RUN python3 -m venv /opt/venv
COPY constraints.txt docker/requirements.py pyproject.toml ./
# The dependencies alone first: they change less often than the code, and this layer is then kept. What is removed is
# never loaded here: the packages' own tests, tools, a second copy of ONNX Runtime for programs in C, and Pillow's AVIF.
RUN python3 requirements.py < pyproject.toml > requirements.txt \
 && /opt/venv/bin/pip install --no-cache-dir --no-compile -c constraints.txt -r requirements.txt 'setuptools>=77' \
 && find /opt/venv -type d \( -name tests -o -name test \) -path '*/site-packages/*' -prune -exec rm -rf {} + \
 && rm -rf /opt/venv/lib/python3*/site-packages/onnxruntime/transformers \
           /opt/venv/lib/python3*/site-packages/onnxruntime/tools \
           /opt/venv/lib/python3*/site-packages/onnxruntime/quantization \
           /opt/venv/lib/python3*/site-packages/onnxruntime/capi/libonnxruntime.so.* \
           /opt/venv/lib/python3*/site-packages/PIL/_avif.* \
           /opt/venv/lib/python3*/site-packages/pillow.libs/libavif-*
# OpenCV and FAISS each bring the same release of OpenBLAS, 39 MB; FAISS's serves both. OpenCV's is for functions that are
# not in use here, and only has to be there.
RUN cd /opt/venv/lib/python3*/site-packages/opencv_python_headless.libs \
 && ln -sf ../faiss_cpu.libs/libopenblaso-* "$(ls libopenblasp-*)" \
 && ln -sf ../faiss_cpu.libs/libgomp-* .
COPY README.md LICENSE ./
COPY service service
COPY models models
COPY docker/first_start.py ./
# Python keeps the compiled form of what this first start loads; of everything that is installed it would be 30 MB more.
RUN /opt/venv/bin/pip install --no-cache-dir --no-compile --no-deps --no-build-isolation --no-index . \
 && /opt/venv/bin/pip uninstall --yes --quiet setuptools pip \
 && VULTUS_MODELS_DIR=/app/models VULTUS_DATA_DIR=/tmp/first /opt/venv/bin/python3 first_start.py

FROM python:3.11-slim-bookworm
COPY --from=build /opt/venv /opt/venv
COPY models /opt/vultus/models
COPY LICENSE /opt/vultus/LICENSE
RUN groupadd --gid 10001 vultus && useradd --uid 10001 --gid 10001 --no-create-home --shell /usr/sbin/nologin vultus \
 && install -d -o vultus -g vultus /data
ENV PATH=/opt/venv/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    MPLCONFIGDIR=/tmp/matplotlib \
    VULTUS_HOST=0.0.0.0 \
    VULTUS_PORT=8000 \
    VULTUS_DATA_DIR=/data \
    VULTUS_MODELS_DIR=/opt/vultus/models \
    VULTUS_API_KEYS_FILE=/data/keys.json
USER vultus
VOLUME /data
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=5s --start-period=60s --retries=3 \
    CMD ["python3", "-c", "import os, urllib.request as u; u.urlopen('http://127.0.0.1:' + os.environ['VULTUS_PORT'] + '/readyz', timeout=4)"]
ENTRYPOINT ["vultus"]
CMD ["serve"]
