// SPDX-License-Identifier: Apache-2.0 OR MIT OR GPL-2.0-only
// The connections that are balanced: each has two entries, for what its client sends and for what it gets.
#pragma once
#include "packet.h"

// Without an answer a TCP connection does not begin (as IPVS: tcp_timeouts in net/netfilter/ipvs).
#define TIMEOUT_OPENING 60
// One that both sides have ended, or one has reset, waits for late packets.
#define TIMEOUT_CLOSED 10
// SCTP, as IPVS has it (sctp_timeouts).
#define TIMEOUT_SCTP 900

static __always_inline bool is_closed(const struct connection *connection) {
    __u8 ended = STATE_CLIENT_ENDED | STATE_SERVER_ENDED;
    return connection->state & STATE_RESET || (connection->state & ended) == ended;
}

static __always_inline __u32 timeout_of(const struct connection *connection, const struct tuple *tuple) {
    __u32 key = tuple->network;
    __u8 protocol = tuple->protocol;
    struct timeouts *times = bpf_map_lookup_elem(&timeouts, &key);
    if (protocol == IPPROTO_SCTP || !times)
        return TIMEOUT_SCTP;
    if (protocol == IPPROTO_UDP)
        return times->udp;
    if (is_closed(connection))
        return TIMEOUT_CLOSED;
    if (connection->state & (STATE_CLIENT_ENDED | STATE_SERVER_ENDED))
        return times->tcp_fin;
    return connection->state & STATE_ANSWERED ? times->tcp : TIMEOUT_OPENING;
}

// How what goes the other way is known: by what this way's packets become.
static __always_inline void other_way(struct tuple *other, const struct tuple *this,
                                      const struct connection *connection) {
    __builtin_memset(other, 0, sizeof *other);
    other->network = this->network;
    other->source = connection->destination;
    other->destination = connection->source;
    other->source_port = connection->destination_port;
    other->destination_port = connection->source_port;
    other->protocol = this->protocol;
    other->reply = !this->reply;
}

// Whether no packet came for too long, in either direction.
static __always_inline bool
has_expired(const struct tuple *tuple, const struct connection *connection, const struct tuple *other) {
    __u32 now = seconds(), quiet = now - connection->seen;
    // No timeout is that short; another processor's clock may be ahead.
    if ((__s32)quiet <= 0)
        return false;
    __u32 timeout = timeout_of(connection, tuple);
    if (quiet < timeout)
        return false;
    struct connection *back = bpf_map_lookup_elem(&connections, other);
    return !back || (__s32)(now - back->seen) >= (__s32)timeout;
}

static __always_inline void forget(const struct tuple *tuple, const struct tuple *other) {
    bpf_map_delete_elem(&connections, tuple);
    bpf_map_delete_elem(&connections, other);
}

// Begins to count for a backend; gives whether there is such a one.
SEPARATE bool begin_counting(__u32 number) {
    __u32 backend = number;
    struct counts none = {};
    if (!bpf_map_lookup_elem(&backends, &backend))
        return false;
    // Where there is no memory for it the next packet tries again.
    bpf_map_update_elem(&counts, &backend, &none, BPF_NOEXIST);
    // The agent may have removed both in between; then nobody else would remove this one.
    if (bpf_map_lookup_elem(&backends, &backend))
        return true;
    bpf_map_delete_elem(&counts, &backend);
    return false;
}

// Whether a backend is there, with what is counted of it.
static __always_inline bool is_there(__u32 number, struct counts **counted) {
    *counted = bpf_map_lookup_elem(&counts, &number);
    if (*counted)
        return true;
    if (!begin_counting(number))
        return false;
    *counted = bpf_map_lookup_elem(&counts, &number);
    return true;
}

static __always_inline void count_incoming(struct counts *counted, const struct __sk_buff *skb) {
    if (!counted)
        return;
    counted->incoming_packets += 1;
    counted->incoming_bytes += skb->len - ETH_HLEN;
}

static __always_inline void count_outgoing(struct counts *counted, const struct __sk_buff *skb) {
    if (!counted)
        return;
    counted->outgoing_packets += 1;
    counted->outgoing_bytes += skb->len - ETH_HLEN;
}

// The connection of a packet, with the other way's key; nothing where it has ended or its backend is gone.
static __always_inline struct connection *
find(const struct tuple *tuple, struct tuple *other, struct counts **counted) {
    struct connection *connection = bpf_map_lookup_elem(&connections, tuple);
    if (!connection)
        return NULL;
    other_way(other, tuple, connection);
    if (is_there(connection->backend, counted) && !has_expired(tuple, connection, other))
        return connection;
    forget(tuple, other);
    return NULL;
}

// One connection less at a backend. Where others count at the same time it may be left undone: the agent
// puts that right.
static __always_inline void leave(__u32 number) {
    struct backend *backend = bpf_map_lookup_elem(&backends, &number);
    __u32 open = backend ? backend->open : 0;
    if (open)
        __sync_val_compare_and_swap(&backend->open, open, open - 1);
}

// Notes what a packet means for its connection, in both entries.
static __always_inline void follow(
    struct connection *connection,
    const struct tuple *this,
    const struct tuple *other,
    const struct packet *packet) {
    __u8 state = connection->state;
    bool is_answer = this->reply;
    if (is_answer)
        state |= STATE_ANSWERED;
    if (packet->tcp_flags & TCP_RST)
        state |= STATE_RESET;
    if (packet->tcp_flags & TCP_FIN)
        state |= is_answer ? STATE_SERVER_ENDED : STATE_CLIENT_ENDED;
    __u32 now = seconds();
    // Most packets write nothing here: another processor may read the same.
    if (connection->seen == now && connection->state == state)
        return;
    bool was_closed = is_closed(connection);
    connection->seen = now;
    connection->state = state;
    struct connection *back = bpf_map_lookup_elem(&connections, other);
    if (!back) {
        // It has left a full table: the next packet begins anew.
        bpf_map_delete_elem(&connections, this);
        return;
    }
    if ((back->state | state) == back->state)
        return;
    back->state |= state;
    if (!was_closed && is_closed(back))
        leave(connection->backend);
}
