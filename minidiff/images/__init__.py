"""Images: conversion from and to files and arrays, and figures."""
