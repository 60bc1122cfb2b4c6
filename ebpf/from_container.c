// SPDX-License-Identifier: Apache-2.0 OR MIT OR GPL-2.0-only
// What a container sends, where it enters its sandbox: connections to services get their backends.
// Everything else goes on as it is.
#include "icmp.h"
#include "open.h"
#include "rewrite.h"

// Sends a frame back to who has sent it, by the device that it came from.
static __always_inline int send_back(struct __sk_buff *skb) {
    struct ethhdr frame;
    __u8 sender[ETH_ALEN];
    if (bpf_skb_load_bytes(skb, 0, &frame, sizeof frame))
        return TC_ACT_SHOT;
    __builtin_memcpy(sender, frame.h_source, sizeof sender);
    __builtin_memcpy(frame.h_source, frame.h_dest, sizeof sender);
    __builtin_memcpy(frame.h_dest, sender, sizeof sender);
    if (bpf_skb_store_bytes(skb, 0, &frame, sizeof frame, 0))
        return TC_ACT_SHOT;
    return bpf_redirect(skb->ifindex, 0);
}

// Sends a packet on: what is for its own sender goes back, everything else is routed.
static __always_inline int
send_on(struct __sk_buff *skb, struct packet *packet, struct connection *connection) {
    bool loops = connection->loops;
    if (rewrite(skb, packet, connection))
        return TC_ACT_SHOT;
    return loops ? send_back(skb) : PASS;
}

SEC("classifier")
int netctl_from(struct __sk_buff *skb) {
    struct packet packet = {};
    struct tuple other;
    struct counts *counted;
    if (read_addresses(skb, &packet))
        return PASS;
    struct place place = {.network = network, .address = packet.tuple.destination};
    __u32 *kind = bpf_map_lookup_elem(&addresses, &place);
    if (!kind)
        return PASS;
    if (is_error(&packet))
        return translate_error(skb, &packet, 0);
    if (read_ports(skb, &packet))
        return PASS;
    // A backend that has met itself answers the gateway.
    packet.tuple.reply = *kind == ADDRESS_GATEWAY;
    struct connection *connection = find(&packet.tuple, &other, &counted);
    bool begins =
        packet.tuple.protocol != IPPROTO_TCP || (packet.tcp_flags & (TCP_SYN | TCP_ACK)) == TCP_SYN;
    bool is_moved = connection && connection->interface != skb->ifindex;
    // Where somebody else speaks for the client the kernel drops that.
    if (is_moved && !is_own_source(skb, &packet)) {
        note(EVENT_FOREIGN_SOURCE);
        return PASS;
    }
    // A client's port that comes again is a new connection, and so is all of a client that was made anew.
    bool is_reused = packet.tuple.protocol == IPPROTO_TCP && begins;
    if (connection && (is_moved || (is_reused && is_closed(connection)))) {
        forget(&packet.tuple, &other);
        connection = NULL;
    }
    if (connection) {
        remember_fragment(skb, &packet);
        if (packet.tuple.reply) {
            counted->outgoing_packets += 1;
            counted->outgoing_bytes += skb->len - ETH_HLEN;
        } else {
            counted->incoming_packets += 1;
            counted->incoming_bytes += skb->len - ETH_HLEN;
        }
        follow(connection, &other, &packet);
        return send_on(skb, &packet, connection);
    }
    if (packet.tuple.reply || !begins)
        return PASS;
    struct connection new = {.interface = skb->ifindex, .seen = seconds()};
    if (!open_connection(skb, &packet, &new))
        return PASS;
    remember_fragment(skb, &packet);
    counted = bpf_map_lookup_elem(&counts, &new.backend);
    if (counted) {
        counted->connections += 1;
        counted->incoming_packets += 1;
        counted->incoming_bytes += skb->len - ETH_HLEN;
    }
    return send_on(skb, &packet, &new);
}

const char LICENSE[] SEC("license") = "Dual MIT/GPL";
