# Build: docker build -t walgate .
# Run:   docker run -v ./my.yaml:/etc/walgate/config.yaml:ro -v walgate-blobs:/var/lib/walgate -e DATABASE_URL -e JWT_SECRET -p 8080:8080 walgate
#        (blobs.url: file:///var/lib/walgate/blobs, or a bucket)
FROM golang:1.26-bookworm AS build
WORKDIR /src
COPY go.mod go.sum ./
RUN go mod download
COPY . .
RUN mkdir -p /var/lib/walgate && CGO_ENABLED=0 go build -tags disable_grpc_modules -trimpath -ldflags="-s -w" -o /walgate .

FROM gcr.io/distroless/static-debian12:nonroot
COPY --from=build /walgate /walgate
COPY --from=build --chown=nonroot:nonroot /var/lib/walgate /var/lib/walgate
ENV WALGATE_CONFIG=/etc/walgate/config.yaml
EXPOSE 8080
USER nonroot
ENTRYPOINT ["/walgate"]
CMD ["serve"]
