# Build: docker build -t walgate .
# Run:   docker run -v ./config.yaml:/etc/walgate/config.yaml:ro -e DATABASE_URL -p 8080:8080 walgate
FROM golang:1.26-bookworm AS build
WORKDIR /src
COPY go.mod go.sum ./
RUN go mod download
COPY . .
RUN CGO_ENABLED=0 go build -tags disable_grpc_modules -trimpath -ldflags="-s -w" -o /walgate .

FROM gcr.io/distroless/static-debian12:nonroot
COPY --from=build /walgate /walgate
ENV WALGATE_CONFIG=/etc/walgate/config.yaml
EXPOSE 8080
USER nonroot
ENTRYPOINT ["/walgate"]
CMD ["serve"]
