//! Tests of which datagrams are counted as lost.

use super::*;

#[test]
fn what_a_listener_had_no_room_for_is_counted_when_it_closes() {
    for is_paused in [false, true] {
        let mut scene = Scene::new(Limits::default());
        SockRef::from(&scene.port.as_fd()).set_recv_buffer_size(1).unwrap();
        let client = scene.client();
        let mut sent = 0;
        let dropped = loop {
            client.send(&[7; 1000]).unwrap();
            sent += 1;
            assert!(sent < 10_000, "the kernel has room for all of it");
            match rproxy_sys::udp::dropped(scene.port.as_fd()).unwrap() {
                0 => {}
                dropped => break dropped,
            }
        };
        let number = scene.port.number();
        scene.relay.listeners[number].is_paused = is_paused;
        scene.relay.listeners.close_one(number);
        // If a flow is paused, another process continues with it and counts them.
        let counted = if is_paused { 0 } else { u64::from(dropped) };
        assert_eq!(scene.failures(FailureKind::NoBuffer), counted);
    }
}

#[test]
fn what_a_listener_had_no_room_for_is_counted_while_it_is_served() {
    let mut scene = Scene::new(Limits::default());
    rproxy_sys::udp::report_class_and_drops(scene.port.as_fd(), false).unwrap();
    SockRef::from(&*scene.port).set_recv_buffer_size(1).unwrap();
    let client = scene.client();
    for _ in 0..100 {
        client.send(&[0; 1000]).unwrap();
    }
    scene.settle();
    assert_eq!(scene.failures(FailureKind::NoBuffer), 0, "the next datagram tells");
    client.send(&[0; 1000]).unwrap();
    scene.serve_until("the loss is counted", |scene| scene.failures(FailureKind::NoBuffer) > 0);
    scene.settle();
    let relayed = scene.stats().datagrams_in.get();
    assert_eq!(scene.failures(FailureKind::NoBuffer) + relayed, 101);
}

#[test]
fn what_a_flow_had_no_room_for_is_counted_while_it_lasts() {
    let mut scene = Scene::new(Limits::default());
    let client = scene.client();
    client.send(b"request").unwrap();
    let (_request, from) = scene.at_backend();
    let id = scene.flow(&client).unwrap();
    SockRef::from(&scene.relay.table.get(id).unwrap().1.as_fd()).set_recv_buffer_size(1).unwrap();
    for _ in 0..100 {
        scene.backend.send_to(&[0; 1000], from).unwrap();
    }
    scene.settle();
    assert_eq!(scene.failures(FailureKind::NoBuffer), 0, "the next datagram tells");
    scene.backend.send_to(&[0; 1000], from).unwrap();
    scene.serve_until("the loss is counted", |scene| scene.failures(FailureKind::NoBuffer) > 0);
    scene.settle();
    assert_eq!(scene.failures(FailureKind::NoBuffer) + scene.stats().datagrams_out.get(), 101);
}

#[test]
fn what_waits_for_a_flow_that_ends_is_counted_as_lost() {
    let mut scene = Scene::new(Limits::default());
    let client = scene.client();
    let (id, _backend) = scene.flow_to_reader(&client);
    let mut size = 1000;
    while scene.unsent(id) < 2 {
        size += 1;
        client.send(&vec![7; size]).unwrap();
        scene.serve_until("it is taken", |scene| scene.sent_and_unsent(id) == size - 1000);
    }
    scene.relay.end_flows(Ending::Removed, |_listeners, _key| true);
    assert_eq!(scene.failures(FailureKind::NoBuffer), 2);
    assert_eq!(scene.stats().flows.get(), 1, "its socket is closed later");
    scene.relay.close_ended(1);
    assert_eq!(scene.stats().flows.get(), 0);
    assert!(scene.relay.is_quiet(Instant::now()), "nothing is left of it");
}

#[test]
fn an_answer_that_nobody_has_read_is_counted_as_lost_when_its_flow_ends() {
    let mut scene = Scene::new(Limits::default());
    let client = scene.client();
    client.send(b"hello").unwrap();
    let (_hello, flow) = scene.at_backend();
    scene.backend.send_to(b"too late", flow).unwrap();
    let id = scene.flow(&client).unwrap();
    let socket = scene.relay.table.get(id).unwrap().1.socket();
    wait_until_readable(&socket);
    scene.relay.end_flows(Ending::Removed, |_listeners, _key| true);
    drop(socket);
    scene.relay.close_ended(1);
    assert_eq!(scene.failures(FailureKind::NoBuffer), 1);
}

/// Waits until a socket is readable.
fn wait_until_readable(socket: &OwnedFd) {
    let mut wanted = [PollFd::new(socket.as_fd(), PollFlags::POLLIN)];
    assert_eq!(poll(&mut wanted, PollTimeout::try_from(PATIENCE).unwrap()).unwrap(), 1);
}
