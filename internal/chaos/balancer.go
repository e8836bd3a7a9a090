package chaos

import (
	"context"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"net/http/httputil"
	"net/url"
	"sync"
	"sync/atomic"
	"time"
)

const (
	probeInterval = 150 * time.Millisecond
	probeLimit    = time.Second
	answerLimit   = 40 * time.Second // until a gateway's answer begins; longer than a client may ask it to wait
)

// balancer is an HTTP load balancer as operators have them: it gives each request to the next gateway whose /readyz says
// that it takes some, and knows no sessions. What breaks on the way is the client's to repeat.
type balancer struct {
	base     string // URL
	backends []*backend
	next     atomic.Uint64
	server   *http.Server
	stop     context.CancelFunc
	running  sync.WaitGroup
}

type backend struct {
	url   *url.URL
	proxy *httputil.ReverseProxy
	way   *http.Transport
	ready atomic.Bool
}

// startBalancer listens on a free port. fronts are the addresses of the gateways, by their relays.
func startBalancer(fronts []string) (*balancer, error) {
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, err
	}
	ctx, stop := context.WithCancel(context.Background())
	b := &balancer{base: "http://" + listener.Addr().String(), stop: stop}
	for n, front := range fronts {
		b.backends = append(b.backends, newBackend(fmt.Sprint(n+1), front))
	}
	quiet := log.New(io.Discard, "", 0)
	b.server = &http.Server{Handler: b, ErrorLog: quiet}
	for _, to := range b.backends {
		b.running.Go(func() { to.watch(ctx) })
	}
	b.running.Go(func() { _ = b.server.Serve(listener) }) // until Close
	return b, nil
}

func newBackend(name, front string) *backend {
	to := &backend{url: &url.URL{Scheme: "http", Host: front}}
	to.way = &http.Transport{ResponseHeaderTimeout: answerLimit, MaxIdleConnsPerHost: 8, IdleConnTimeout: 10 * time.Second}
	to.proxy = &httputil.ReverseProxy{
		Rewrite:       func(r *httputil.ProxyRequest) { r.SetURL(to.url) },
		Transport:     to.way,
		FlushInterval: -1,
		ModifyResponse: func(res *http.Response) error {
			res.Header.Set("X-Chaos-Instance", name)
			return nil
		},
		ErrorLog:     log.New(io.Discard, "", 0),
		ErrorHandler: func(w http.ResponseWriter, _ *http.Request, _ error) { w.WriteHeader(http.StatusBadGateway) },
	}
	return to
}

// ServeHTTP gives the request to the next gateway that is ready.
func (b *balancer) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	first := b.next.Add(1)
	for n := range uint64(len(b.backends)) {
		if to := b.backends[(first+n)%uint64(len(b.backends))]; to.ready.Load() {
			to.proxy.ServeHTTP(w, r)
			return
		}
	}
	w.WriteHeader(http.StatusServiceUnavailable)
}

// watch asks a gateway again and again whether it takes clients.
func (to *backend) watch(ctx context.Context) {
	client := &http.Client{Transport: to.way, Timeout: probeLimit}
	for {
		to.ready.Store(to.probe(ctx, client))
		if !sleep(ctx, probeInterval) {
			return
		}
	}
}

func (to *backend) probe(ctx context.Context, client *http.Client) bool {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, to.url.String()+"/readyz", nil)
	if err != nil {
		return false
	}
	res, err := client.Do(req)
	if err != nil {
		return false
	}
	_, _ = io.Copy(io.Discard, res.Body) // so that the connection can be used again
	_ = res.Body.Close()
	return res.StatusCode == http.StatusOK
}

// allReady says whether every gateway takes clients.
func (b *balancer) allReady() bool {
	for _, to := range b.backends {
		if !to.ready.Load() {
			return false
		}
	}
	return true
}

// Close ends the balancer and its connections.
func (b *balancer) Close() {
	b.stop()
	_ = b.server.Close()
	b.running.Wait()
	for _, to := range b.backends {
		to.way.CloseIdleConnections()
	}
}
