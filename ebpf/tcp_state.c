// SPDX-License-Identifier: Apache-2.0 OR MIT OR GPL-2.0-only
// What becomes of the TCP sockets that have asked for a service: a drain waits for those that are open. What they
// have sent and got is counted when they end.
#include "socket.h"

#define TCP_ESTABLISHED 1
#define TCP_CLOSE 7

static __always_inline void count_bytes(const struct bpf_sock_ops *ctx, __u32 number) {
    struct counts *counted = bpf_map_lookup_elem(&counts, &number);
    if (!counted)
        return;
    __sync_fetch_and_add(&counted->incoming_packets, ctx->segs_out);
    __sync_fetch_and_add(&counted->incoming_bytes, ctx->bytes_acked);
    __sync_fetch_and_add(&counted->outgoing_packets, ctx->segs_in);
    __sync_fetch_and_add(&counted->outgoing_bytes, ctx->bytes_received);
}

SEC("sockops")
int netctl_tcp(struct bpf_sock_ops *ctx) {
    if (ctx->op != BPF_SOCK_OPS_TCP_CONNECT_CB && ctx->op != BPF_SOCK_OPS_STATE_CB)
        return ALLOW;
    __u64 number = bpf_get_socket_cookie(ctx);
    struct socket *socket = bpf_map_lookup_elem(&sockets, &number);
    if (!socket)
        return ALLOW;
    if (ctx->op == BPF_SOCK_OPS_TCP_CONNECT_CB) {
        bpf_sock_ops_cb_flags_set(ctx, ctx->bpf_sock_ops_cb_flags | BPF_SOCK_OPS_STATE_CB_FLAG);
    } else if (ctx->args[1] == TCP_ESTABLISHED) {
        socket->state = SOCKET_OPEN;
    } else if (ctx->args[1] == TCP_CLOSE) {
        count_bytes(ctx, socket->number);
        closed(number, socket);
    } else {
        socket->state = SOCKET_ENDING;
    }
    return ALLOW;
}

const char LICENSE[] SEC("license") = "Dual MIT/GPL";
