// Package gateway serves clients: pull, full resync and stream over HTTP and WebSocket.
//
// It owns authentication, the wire format, the hub that finds the subscribers of a change, and the sessions. It never
// writes to the source but for fences, never appends to the log, and holds no state that another instance would need.
//
// A change reaches a client so: Bus → hub.apply (finds subscribers by scope, encodes the frame once) → subscriber's queue
// → session.write. A subscriber whose queue is full leaves the live path and reads the log until it has caught up.
package gateway
