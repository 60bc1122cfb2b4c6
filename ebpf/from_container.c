// SPDX-License-Identifier: Apache-2.0 OR MIT OR GPL-2.0-only
// What a container sends, where it enters its sandbox: names are told, connections to services get their
// backends, and what stays within the network skips the stack. Everything else goes on as it is.
#include "icmp.h"
#include "names.h"
#include "of_network.h"
#include "open.h"
#include "path.h"
#include "report.h"

// Sends a frame back to who has sent it, by the device that it came from.
static __always_inline int send_back(struct __sk_buff *skb, struct packet *packet) {
    return turn_frame(skb) ? lost(packet) : bpf_redirect(skb->ifindex, 0);
}

// What is to be done with a packet that has its backend, beside what is to be done with every packet.
#define SEND_ON 100

// Gives a packet its backend: what is for its own sender goes back.
static __always_inline int
send_to(struct __sk_buff *skb, struct packet *packet, struct connection *connection) {
    if (rewrite(skb, packet, connection))
        return lost(packet);
    note_translation(packet, &connection->destination, connection->destination_port);
    packet->tuple.source = connection->source;
    packet->tuple.destination = connection->destination;
    __u32 at = ETH_HLEN + offsetof(struct iphdr, check);
    if (packet->ipv4 && load(skb, at, &packet->checksum, sizeof packet->checksum))
        return lost(packet);
    return connection->loops ? send_back(skb, packet) : SEND_ON;
}

// Balances a packet for a service, or an answer of a backend that has met itself.
SEPARATE int balance(struct __sk_buff *skb, struct packet *packet, __u32 kind) {
    __u32 zero = 0;
    struct tuple tuple, other;
    struct counts *counted;
    struct scratch *scratch = bpf_map_lookup_elem(&scratches, &zero);
    if (!packet || !scratch)
        return PASS;
    if (read_ports(skb, packet))
        return PASS;
    // A backend that has met itself answers the gateway.
    packet->tuple.reply = kind == ADDRESS_GATEWAY;
    tuple = packet->tuple;
    struct connection *connection = find(&tuple, &other, &counted);
    bool begins = tuple.protocol != IPPROTO_TCP || (packet->tcp_flags & (TCP_SYN | TCP_ACK)) == TCP_SYN;
    bool is_moved = connection && connection->interface != skb->ifindex;
    // Where somebody else speaks for the client the kernel drops that.
    if (is_moved && !is_own_source(skb, packet)) {
        note(EVENT_FOREIGN_SOURCE);
        return PASS;
    }
    // A client's port that comes again is a new connection, and so is all of a client that was made anew.
    bool is_reused = tuple.protocol == IPPROTO_TCP && begins;
    if (connection && (is_moved || (is_reused && is_closed(connection)))) {
        forget(&tuple, &other);
        connection = NULL;
    }
    struct connection *becomes = &scratch->connection;
    if (connection) {
        // Its entry may become another's as soon as it has left the table.
        *becomes = *connection;
        remember_fragment(skb, packet);
        if (tuple.reply)
            count_outgoing(counted, skb);
        else
            count_incoming(counted, skb);
        follow(connection, &tuple, &other, packet);
        return send_to(skb, packet, becomes);
    }
    if (tuple.reply || !begins)
        return PASS;
    *becomes = (struct connection){.interface = skb->ifindex, .seen = seconds()};
    if (!open_connection(skb, packet))
        return PASS;
    remember_fragment(skb, packet);
    if (is_there(becomes->backend, &counted) && counted)
        counted->connections += 1;
    count_incoming(counted, skb);
    return send_to(skb, packet, becomes);
}

static __always_inline int carry(struct __sk_buff *skb, struct packet *packet) {
    if (asks_for_name(skb, packet)) {
        int verdict = answer_name(skb, packet);
        if (verdict != PASS)
            return verdict;
    }
    // What is balanced is no flow that is known.
    int verdict = send(skb, packet, false);
    if (verdict != PASS)
        return verdict;
    struct meaning *meaning = meaning_of(network, &packet->tuple.destination);
    if (meaning && meaning->kind != ADDRESS_CONTAINER) {
        if (is_error(packet))
            return translate_error(skb, packet, 0);
        verdict = balance(skb, packet, meaning->kind);
        if (verdict != SEND_ON)
            return verdict;
    }
    return send(skb, packet, true);
}

SEC("classifier")
int netctl_from(struct __sk_buff *skb) {
    struct packet packet = {.tuple.network = network};
    // A frame with a tag is not for the sandbox; carried on it would bring its tag into the underlay.
    if (skb->vlan_present || read_addresses(skb, &packet, skb->protocol, ETH_HLEN))
        return PASS;
    struct report *report = begin_report(skb, &packet, POINT_FROM_CONTAINER, ETH_HLEN);
    return end_report(report, &packet, carry(skb, &packet));
}

const char LICENSE[] SEC("license") = "Dual MIT/GPL";
