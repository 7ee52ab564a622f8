# `docker build -t pfedmoap . && docker run --rm -v "$PWD/runs:/home/pfedmoap/runs" pfedmoap run`
# Not built by its developers yet, who had no container engine at hand.
FROM python:3.11-slim
COPY . /opt/pfedmoap
RUN pip install --no-cache-dir --constraint /opt/pfedmoap/requirements/lock.txt /opt/pfedmoap \
    && useradd --create-home pfedmoap
USER pfedmoap
WORKDIR /home/pfedmoap
ENTRYPOINT ["pfedmoap"]
CMD ["--help"]
